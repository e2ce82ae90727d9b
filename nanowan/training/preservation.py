"""Prior preservation: some samples get a prompt to preserve, and the base model's prediction becomes their target."""

import torch

from lora import adapter_off
from nanowan.errors import BadInput
from nanowan.training.captions import has_keyword, without_keywords


def prompts_to_preserve(args, captions, prompts):
    """Return the prompts whose clips the LoRA must leave unchanged: `prompts`, which are those of --preserve_prompts,
    and, if --trigger is given, all captions without its words. Return [] without --preserve. Raises BadInput if there
    is no prompt to return, or if a word of --trigger occurs in no caption.
    """
    if not args.preserve:
        return []
    for word in args.trigger:
        if not any(has_keyword(c, [word]) for c in captions):
            raise BadInput(f"--trigger {word}: no caption holds it, and --preserve needs those that do")
    others = [c for c in without_keywords(captions, args.trigger) if c] if args.trigger else []
    if not prompts and not others:
        raise BadInput(
            f"--preserve {args.preserve}: every caption holds a word of --trigger {','.join(args.trigger)}; give "
            "--preserve_prompts FILE"
        )
    return list(dict.fromkeys([*prompts, *others]))


@torch.no_grad()
def with_base_targets(batch, dit, context, lens):
    """Return the Batch with new targets for the samples that Batch.preserved marks: the predictions of the base model,
    which is `dit` without its adapter. In DreamBooth (Ruiz et al., 2022), which introduced prior preservation, the
    targets are generated pictures. context (B,S,D), lens (B,): the embedded prompts. If Batch.preserved marks no
    sample, the base model runs on one sample all the same, since other ranks may wait for this rank.
    """
    if batch.preserved is None:
        return batch
    chosen = batch.preserved.nonzero().flatten()
    run = chosen if len(chosen) else torch.tensor([0])
    part = batch._replace(x=batch.x[run], t=batch.t[run], inputs={k: v[run] for k, v in batch.inputs.items()})
    on_device = run.to(context.device)
    with adapter_off(dit):
        v = part.velocity(dit, context[on_device], lens[on_device])
    target = batch.target.clone()
    target[chosen] = v[: len(chosen)].to(target)
    return batch._replace(target=target)
