"""Run the CUDA code on a machine without a GPU, on four devices that allocate memory but compute nothing (driver.cpp,
nccl.cpp). This needs nvcc and a CUDA build of PyTorch, which brings the headers of cuDNN and NCCL.

    python tests/fake_cuda emulate -m pytest -m gpu tests/test_gpu.py    run a command; the CPU computes the results
    python tests/fake_cuda plans OUT.json                                run the scripts at released size on sparse
                                                                         files; compare planned memory with PyTorch's
                                                                         allocator
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent.parent
FITS = ("ti2v-5B: sample", "ti2v-5B: sample, fp8", "ti2v-5B: train_lora", "ti2v-5B: train_te, rows")
FITS += ("ti2v-5B: sample, compiled", "ti2v-5B: sample, CUDA graphs", "ti2v-5B: train_lora, fp8 and streamed")
FITS += ("ti2v-5B: train_te, LoRAs, fp8", "t2v-A14B: sample, fp8")
EXTRA = {"ti2v-5B: train_te, rows, fp8": ("ti2v-5B: train_te, rows", "--base_dtype fp8")}  # one more flag
# runs on two ranks: {name: (the run in full_size.RUNS, flags added to it)}
RANKS = {
    "ti2v-5B: train_lora, FSDP2 and Ulysses": ("ti2v-5B: train_lora", "--fsdp --ulysses_size 2"),
    "ti2v-5B: train_lora, FSDP2 and fp8": ("ti2v-5B: train_lora", "--fsdp --base_dtype fp8"),
    "ti2v-5B: train_lora, pipeline": ("ti2v-5B: train_lora", "--pipeline_stages 2"),
    "ti2v-5B: train_te, FSDP2": ("ti2v-5B: train_te, rows", "--fsdp --train_blocks 2"),
    "ti2v-5B: sample, Ulysses": ("ti2v-5B: sample", "--ulysses_size 2"),
    "ti2v-5B: sample, guidance on two": ("ti2v-5B: sample", "--guidance_parallel"),
    "t2v-A14B: train_lora, FSDP2 and Ulysses": ("ti2v-5B: train_lora", "--fsdp --ulysses_size 2"),
}
TORCHRUN = "-m torch.distributed.run --nproc_per_node 2"
# full_size.py streams the blocks of these runs, which needs more host than device memory; here the card is large, and
# no block is streamed
WHOLE = {"s2v-14B: sample": "s2v-14B: sample, streamed", "animate-14B: sample": "animate-14B: sample, streamed"}


def build(folder):
    """Compile driver.cpp and nccl.cpp to libcuda.so.1, in `folder`."""
    import torch

    headers = [f"-I{Path(torch.__file__).parent.parent}/nvidia/{name}/include" for name in ("cudnn", "nccl")]
    flags = ["-w", "-O1", "-shared", "-std=c++17", "-cudart", "none", "-Xcompiler", "-fPIC", *headers]
    flags += ["-Xlinker", "-soname=libcuda.so.1", "-o", Path(folder, "libcuda.so.1"), "-ldl"]
    subprocess.run(["nvcc", HERE / "driver.cpp", HERE / "nccl.cpp", *flags], check=True)


def environment(folder, how, **more):
    paths = f"{HERE}:{ROOT}:{ROOT / 'tests'}"
    loader = {"LD_PRELOAD": f"{folder}/libcuda.so.1", "LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}
    return os.environ | loader | {"TRITON_CACHE_DIR": f"{folder}/triton", "PYTHONPATH": paths, "FAKE_CUDA": how} | more


def make_sparse():
    """Make full_size.py write sparse files, which have the right size but contain no weights, and return the module."""
    import safetensors.torch
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks import full_size

    def random_weights(build_model, device):
        torch.set_default_dtype(torch.bfloat16)
        with FakeTensorMode():
            model = build_model().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        model.float = lambda: model
        return model

    def save_file(tensors, path, metadata=None):
        names, header, at = {torch.bfloat16: "BF16", torch.float32: "F32"}, {}, 0
        for name, t in tensors.items():
            header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
            at += t.nbytes
        text = json.dumps(header).encode()
        with open(path, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + at)

    def save(tensors, path, real=torch.save):
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            real(tensors, path)

    full_size.random_weights, torch.save = random_weights, save
    for module in [m for m in sys.modules.values() if getattr(m, "save_file", None) is safetensors.torch.save_file]:
        module.save_file = save_file
    return full_size


def plans(driver, out):
    full_size = make_sparse()
    runs = {name: full_size.RUNS[name] for name in FITS}
    runs |= {name: full_size.RUNS[of].replace(" --stream_blocks 40", "") for name, of in WHOLE.items()}
    runs |= {name: f"{full_size.RUNS[of]} {flags}" for name, (of, flags) in EXTRA.items()}
    runs |= {name: f"{TORCHRUN} {full_size.RUNS[of]} {flags}" for name, (of, flags) in RANKS.items()}
    runs = {name: f"{line} --device cuda" for name, line in runs.items()}
    with tempfile.TemporaryDirectory() as work:
        full_size.write_inputs(Path(work))
        os.environ |= environment(driver, "plans", FAKE_CUDA_COPIES="0")
        full_size.run_scripts(full_size.Checkpoints(Path(work), "cpu"), Path(work), {"gpu": "none"}, out, 3600, runs)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    how, *command = sys.argv[1:]
    with tempfile.TemporaryDirectory() as driver:
        build(driver)
        if how == "plans":
            plans(driver, *command)
        else:
            done = subprocess.run([sys.executable, *command], env=environment(driver, "emulate"))
            sys.exit(done.returncode)
