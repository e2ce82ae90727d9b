"""Train a LoRA with which nano samples in four steps without guidance, like the step-distilled LoRAs for Wan 2.2.

    python runs/distill.py out/claims/fast.safetensors

The teacher is nano as it samples by default, 12 Euler steps with guidance 4. One step of the student covers three steps
of the teacher (progressive distillation, Salimans and Ho, 2022; with guidance, Meng et al., 2023). Training takes six
minutes on one core. Sample with: --lora FILE --steps 4 --guidance 1.
"""

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flow import add_noise, solver  # noqa: E402
from lora import TARGETS, adapter, adapter_off, inject  # noqa: E402
from nano.world import caption_of, every_clip, held_out  # noqa: E402
from nanowan.errors import cli  # noqa: E402
from nanowan.formats.lora import write_lora  # noqa: E402
from sample import load  # noqa: E402

STEPS, BATCH, RANK, LR = 1000, 16, 32, 2e-3
STUDENT_STEPS = 4


def training_pairs(attributes, rng):
    """Return BATCH random indices of clips, and for each clip a caption that is not held out."""
    chosen, texts = [rng.randrange(len(attributes)) for _ in range(BATCH)], []
    for i in chosen:
        while held_out(text := caption_of(attributes[i], rng)):
            pass
        texts.append(text)
    return chosen, texts


@torch.no_grad()
def guided_steps(dit, x, sigmas, text, lens, guidance):
    """Denoise latents x (B,C,T',h,w) by K guided Euler steps, from each of sigmas (B,K+1) to the next. text: the
    embeddings of the B captions, followed by B copies of the negative prompt's embeddings. lens: their lengths.
    """
    for now, then in zip(sigmas.T[:-1], sigmas.T[1:]):
        cond, uncond = dit(torch.cat([x, x]), 1000 * now.repeat(2), text, lens).chunk(2)
        v = uncond + guidance * (cond - uncond)
        x = x + (then - now).view(-1, 1, 1, 1, 1) * v
    return x


def main():
    file, pipe = Path(sys.argv[1]), load("nano")
    s, dit, rng = pipe.settings, pipe.acquire(pipe.settings.expert_names[0]), random.Random(0)
    torch.manual_seed(0)
    attributes, clips = every_clip()
    latents = torch.cat([pipe.acquire("vae").encode(c) for c in clips.split(32)])
    params = inject(dit, TARGETS, RANK, RANK)
    opt = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)
    stride = s.steps // STUDENT_STEPS
    grid = solver("euler", s.steps, s.shift).sigmas.unfold(0, stride + 1, stride)  # (STUDENT_STEPS, stride + 1)
    for step in range(STEPS):
        for group in opt.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 50, (STEPS - step) / (0.5 * STEPS))
        chosen, texts = training_pairs(attributes, rng)
        text, lens = (e[[*range(BATCH), *[BATCH] * BATCH]] for e in pipe.encode_prompts([*texts, s.negative]))
        sigmas = grid[torch.randint(STUDENT_STEPS, (BATCH,))]
        x, _ = add_noise(latents[chosen], torch.randn(latents[chosen].shape), sigmas[:, 0])
        with adapter_off(dit):
            end = guided_steps(dit, x, sigmas, text, lens, s.guidance[0])
        target = (end - x) / (sigmas[:, -1] - sigmas[:, 0]).view(-1, 1, 1, 1, 1)
        loss = F.mse_loss(dit(x, 1000 * sigmas[:, 0], text[:BATCH], lens[:BATCH]), target)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        if step % 100 == 99:
            print(f"step {step + 1}/{STEPS}  loss {loss.item():.4f}", flush=True)
    write_lora(file, adapter(dit))
    print(file)


if __name__ == "__main__":
    cli(main)
