"""Run jobs one after another, on ranks that work together or in one process: `ranks.py JOBS.json`.

A job is {"script", "argv"} with the following optional keys. "ranks": arguments of World, if "script" names a function
of this file. "sgd": whether to use plain SGD. (Adam's first steps are the sign of the gradient, which depends on
rounding where the gradient is nearly zero.) "broken": a key of BREAK, to break a part of the code on purpose. "dump":
beginning of the paths to which the unsharded training states are written when they are saved or restored. A training
run's OUT/sent.json has the bytes that rank 0 sent.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import sample
from benchmarks import tiny
from helpers import scattered, scripts
from nanowan import parallel, pipeline
from nanowan.formats.header import save
from nanowan.parallel import World, ulysses
from nanowan.parallel.pipeline_parallel import Microbatches
from nanowan.training.state import TrainState

WORLDS = []


def whole(state):
    return {f"{i}": parallel.full_tensor(values[key]).cpu().clone() for i, (values, key, _) in enumerate(state)}


def library(out, **ranks):
    """Sample two prompts at once and decode a frame of 28x20 latent pixels, through the library, and write both results
    to the file `out`.
    """
    world = World(scripts.DEVICE, **ranks)
    checkpoint = sample.load("nano", world=world)
    pipeline.free_memory = lambda device: (1 << 40) * (world.rank % 2)  # each rank would decide differently on its own
    latents = sample.sample_latents(
        checkpoint, ["a red circle moves left", "a square"], [0, 1], size=(96, 96), frames=9, steps=3, progress=False
    )
    z = torch.randn(1, 48, 1, 20, 28, generator=torch.Generator().manual_seed(0))
    found = {"latents": latents, "video": sample.decode(checkpoint, z)}
    assert ("tokens" in world.sent) == (world.sp_size > 1) and ("pixels" in world.sent) == (
        world.clip_group_size > 1
    )  # the ranks did share the work
    if world.is_main:
        save(out, found)


def tokens(out, **ranks):
    """Write the outputs and gradients of two models to the file `out`: one whose tokens form no grid, and one with a
    timestep for each latent frame. The numbers of tokens are odd, so two or four ranks cannot share them evenly, and
    slices begin within a frame.
    """
    world, (x, t, context), extra = World("cpu", **ranks), *scattered.inputs()
    cases = {
        "scattered": (scattered.model(), t, extra),
        "frames": (tiny.dit("t2v", heads=4), torch.stack([t, t / 2, 0 * t], 1), {}),
    }
    found = {}
    for name, (dit, times, inputs) in cases.items():
        parallel.parallelize(dit, world)
        leaves = [v.clone().requires_grad_() for v in (context, *inputs.values())]
        y = dit(x, times, leaves[0], **dict(zip(inputs, leaves[1:])))
        (y * torch.sin(torch.arange(y.numel()).view(y.shape))).sum().backward()
        world.all_reduce_grads(leaves)
        found |= {f"{name}_output": y.detach()} | {f"{name}_grad_{i}": v.grad for i, v in enumerate(leaves)}
    if world.is_main:
        save(out, found)


def long_video(out, ckpt, inputs, **ranks):
    """Sample a long video of S2V or Animate through the library, and write the latents of its clips to the file `out`.
    inputs: keyword arguments of sample.generate.
    """
    world = World(scripts.DEVICE, **ranks)
    _, latents = sample.generate(sample.load(ckpt, world=world), "a prompt", progress=False, **inputs)
    assert ("tokens" in world.sent) == (world.sp_size > 1)
    if world.is_main:
        save(out, {f"latents_{r}": z for r, z in enumerate(latents)})


def run(job):
    functions = {"library": library, "tokens": tokens, "long_video": long_video}
    if job["script"] in functions:
        functions[job["script"]](*job["argv"], **job["ranks"])
        return
    module, main = importlib.import_module(job["script"]), int(os.environ.get("RANK", 0)) == 0
    adamw, save_state, restore = getattr(module, "adamw", None), TrainState.save, TrainState.restore
    if job.get("sgd"):
        module.adamw = lambda params, lr, weight_decay=0.0: torch.optim.SGD(params, lr)

    def dump(state, name):
        tensors = whole(state.param_slots(state.state_dict()))
        if main:
            torch.save(tensors, f"{job['dump']}_{name}.pt")

    def save_and_dump(self, run, step):
        save_state(self, run, step)
        dump(self, f"saved_{step}")

    def restore_and_dump(self, state):
        restore(self, state)
        dump(self, f"restored_{self.step}")

    patches = {"save": save_and_dump, "restore": restore_and_dump} if job.get("dump") else {"save": save_state}
    where, what = BREAK.get(job.get("broken"), (parallel, {"parallelize": parallel.parallelize}))
    sys.argv = [job["script"], *job["argv"]]
    with mock.patch.multiple(where, **what), mock.patch.multiple(TrainState, **patches):
        module.main()
    module.adamw = adamw
    if main and "--out" in job["argv"] and job["script"] != "sample":
        Path(job["argv"][job["argv"].index("--out") + 1], "sent.json").write_text(json.dumps(WORLDS[-1].sent))


def first_positions(self, x, c, right=ulysses.Ulysses.scatter):
    x, local = right(self, x, c)
    first = c.tokens.positions[: len(local.tokens.positions)]
    return x, local._replace(tokens=local.tokens._replace(positions=first))


def equal_weights(self, v, index):
    i = self.order[index]
    return (v - self.batch.target[i : i + 1].to(v.device)).square().mean()


BREAK = {
    "no_sum": (World, {"all_reduce_grads": lambda self, params, *numbers: numbers}),
    "no_positions": (ulysses.Ulysses, {"scatter": first_positions}),
    "mean_gradients": (
        FSDPModule,
        dict.fromkeys(["set_gradient_divide_factor", "set_force_sum_reduction_for_comms"], lambda self, value: None),
    ),
    "equal_weights": (Microbatches, {"loss": equal_weights}),
}


if __name__ == "__main__":
    init = World.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if kwargs.get("distributed", True):  # else it is a Pipeline's World before a script sets another
            WORLDS.append(self)

    name = next(
        n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, n)
    )  # the function that fully_shard calls; newer versions of PyTorch have the first
    gather = getattr(dist, name)

    def gathered(output, input, *args, **kwargs):
        WORLDS[-1].count("weights", input.nbytes * (dist.get_world_size(kwargs.get("group")) - 1))
        return gather(output, input, *args, **kwargs)

    World.__init__ = remember
    setattr(dist, name, gathered)
    start, end = dist.init_process_group, dist.destroy_process_group
    dist.destroy_process_group = lambda: None  # all jobs use one process group
    dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or start(*args, **kwargs)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    if dist.is_initialized():
        dist.barrier()
        end()  # if this were left to the interpreter's exit, gloo's threads could abort the process
