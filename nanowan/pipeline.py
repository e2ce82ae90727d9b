"""A checkpoint in use: its text encoder, VAE and DiTs, loaded when first needed and offloaded when memory is short.

The models are named "text", "vae" and "dit"; an A14B has two experts, "high" and "low", instead of "dit"; S2V and
Animate have further encoders. When memory is short, models that are not in use are evicted: from a GPU they move to the
host if it has room; otherwise, and on the device "cpu", they are dropped, and read again when needed. If a text encoder
that is not trained does not fit on a GPU, its blocks are streamed from the host.
"""

import functools
import gc
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import fp8
from lora import adapter, inject, lora_layers
from nanowan.devices import ROOM, VAE_BYTES, activation_bytes, free_memory
from nanowan.errors import BadInput
from nanowan.formats.dit import build_dit, keep_fp32, read_config, read_dit
from nanowan.formats.header import read_header
from nanowan.formats.layouts import expert_folders, vae_files, weight_files
from nanowan.formats.load import load_weights
from nanowan.formats.lora import check_fit, choose_experts, kind_of_lora, merge_file, parse_lora_spec, read_lora
from nanowan.formats.scaled import linears_in_fp8
from nanowan.formats.t5 import EncoderSpec, check_encoder_changes, encoder_source, encoder_specs, load_t5, read_encoder
from nanowan.formats.vae import load_vae
from nanowan.memory.host import Copier, shared_buffer
from nanowan.memory.offload import device_bytes
from nanowan.memory.placement import Placement
from nanowan.parallel import World, parallelize
from nanowan.settings import checkpoint_dir, read_settings


@dataclass
class Runtime:
    """How the models of a checkpoint run: on which device, in which dtype, compiled or not, and on how many ranks.

    dtype: of the weights of the DiT and the text encoder. fp8: whether the linears of the DiT's blocks are in 8 bits
    (kernels/fp8.py). stream_blocks: number of DiT blocks kept on the host until they run (memory/offload.py). compile:
    None, "blocks" (torch.compile for each block) or "graphs" (the full DiT, with CUDA graphs). world: the ranks that
    work together (default: this process alone).
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    stream_blocks: int = 0
    compile: str | None = None
    world: World | None = None

    def __post_init__(self):
        self.device = torch.device(self.device)
        self.world = self.world or World(str(self.device), distributed=False)

    @property
    def cuda(self):
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Adapter:
    """The LoRA that training adds to the DiTs named in `experts`: the arguments of lora.inject, and a seed for its
    initial values.
    """

    experts: tuple
    targets: tuple
    rank: int
    alpha: float
    dropout: float
    blocks: tuple
    seed: int

    def inject(self, dit, device):
        """Add the LoRA to a DiT, whose weights need not be loaded yet. Returns the trainable parameters."""
        return inject(dit, self.targets, self.rank, self.alpha, self.dropout, self.blocks, device)


class Pipeline:
    """The models of one checkpoint, named as described at the top of this file.

    ckpt_dir: a folder, or "nano". loras: list of "FILE[:weight][:high|low|both]"; each is merged into the DiTs or, if
    it is a LoRA of the text encoder, into the text encoder. text_encoder: "FILE[:strength]", or a list of such strings:
    files that replace or change the folder's text encoder (load_t5 in formats/t5.py). The constructor checks the files
    of all experts and all LoRAs, and raises BadInput if one cannot be used.

    For training: `adapter` and `checkpointing` are the Adapter and the value of Wan.checkpointing that each DiT gets
    when it is loaded. `adapters`, {expert: {module: (A, B)}}, keeps the adapters' parameters while a DiT is not in
    memory. takes_turns: whether only one expert is on the device at a time; the other one waits on the host if there is
    room. trains_text: whether the text encoder is trained, and so is never streamed.
    """

    def __init__(self, ckpt_dir, runtime=None, loras=(), text_encoder=None):
        self.dir, self.runtime = checkpoint_dir(ckpt_dir), runtime or Runtime()
        self.settings = read_settings(self.dir)
        self.headers = {name: read_dit(self.folder(name)) for name in self.settings.expert_names}
        self.fp8 = any([self.runtime.fp8, *map(linears_in_fp8, self.headers.values())])
        self.adapter, self.adapters, self.checkpointing = None, {}, False
        self.takes_turns = self.trains_text = False
        self.placements = {}
        if self.settings.variant == "t2v-A14B" and not self.settings.is_moe and self.world.is_main:
            print(f"{self.dir}: a Wan 2.1 model, for which use --shift 5 --guidance 5; the defaults are A14B's")
        self.loras, self.text_encoder = [], encoder_specs(text_encoder)
        for lora in map(parse_lora_spec, loras):
            if kind_of_lora(lora.file) == "text":
                self._add_to_text(lora)
            else:
                self.loras.append(self._check_lora(lora))

    @property
    def device(self):
        return self.runtime.device

    @property
    def world(self):
        return self.runtime.world

    @functools.cached_property
    def copier(self):
        return Copier(self.device)

    def _add_to_text(self, lora):
        """Add the LoRA of a LoraSpec to the changes of the text encoder. Raises BadInput if it does not fit, or if the
        LoraSpec names an expert.
        """
        if lora.expert:
            raise BadInput(f"--lora {lora.file}:{lora.expert}: a LoRA of the text encoder, which has no experts")
        self.text_encoder.append(EncoderSpec(Path(lora.file), lora.weight))
        source = self.encoder_source()
        check_encoder_changes(source, read_encoder(source.base).entries)

    def _check_lora(self, lora):
        """Return (file, weight, names of DiTs to merge it into) for a LoraSpec. Raises BadInput if it does not fit."""
        experts, source = choose_experts(lora, self.settings.expert_names)
        for name in experts:
            shapes = {n: e.shape for n, e in self.headers[name].items()}
            check_fit(lora.file, read_lora(lora.file, name)[0], shapes)
        if source and self.world.is_main:
            print(f"{lora.file}: for {' and '.join(sorted(experts))} noise, as {source} says")
        return lora.file, lora.weight, experts

    # ---- files ---------------------------------------------------------------------------------------------------
    def folder(self, expert):
        return expert_folders(self.dir)[expert]

    def encoder_source(self):
        """Return the EncoderSource, which names the files of the text encoder and those that change it."""
        return encoder_source(self.dir, self.text_encoder)

    def files(self, name):
        """Return the weight files of a model, without LoRAs and other files that change it."""
        if name == "text":
            return self.encoder_source().base
        return vae_files(self.dir) if name == "vae" else weight_files(self.folder(name))

    def config(self, expert=None):
        """Return the WanConfig of a DiT (default: the first expert)."""
        expert = expert or self.settings.expert_names[0]
        return read_config(self.folder(expert), self.headers[expert])

    # ---- where models are ----------------------------------------------------------------------------------------
    def acquire(self, name, activations=ROOM):
        """Move a model to the device, after loading it if necessary, and return it. Other models are evicted if their
        memory is needed for this model and for `activations` bytes of activations. So the caller must hold no reference
        to another model.
        """
        part, device = self.placements.get(name), self.device
        need = activations + (0 if part and part.is_on(device) else self._bytes(name))
        for other in [n for n, p in self.placements.items() if n != name and p.is_on(device)]:
            if free_memory(device) < need or self.takes_turns and {other, name} == {"high", "low"}:
                self.evict(other)
        if part is None:
            part = self.placements[name] = self._load(name, need)
        elif not part.is_on(device):
            part.to(device)
        return part.model

    def acquire_vae(self, size):
        """Acquire the VAE, with room for the activations of frames of `size` (width, height) px."""
        return self.acquire("vae", VAE_BYTES * math.prod(size))

    def evict(self, name):
        """Free a model's memory on the device. From a GPU, the model moves to the host if there is room there;
        otherwise it is dropped. On a CPU, it is dropped unless other ranks share it.
        """
        part, cuda = self.placements[name], self.runtime.cuda
        if part.shared and not cuda:
            return  # other ranks use it too
        if cuda and has_host_room(part):
            part.to("cpu")
            torch.cuda.empty_cache()
        else:
            part = None
            self.drop(name)

    def drop(self, *names):
        """Free the named models (default: all); they are read again when they are next acquired."""
        for name in names or list(self.placements):
            if self.placements.pop(name, None):
                gc.collect()  # a streamed model and its Stream form a reference cycle
        if self.runtime.cuda:
            torch.cuda.empty_cache()

    def loaded(self):
        """Return a list of the models (modules) that are in memory, on the device or on the host."""
        return [part.model for part in self.placements.values()]

    def streams(self):
        """Return the offload.Stream of each DiT that is in memory and has streamed blocks."""
        return [self.placements[n].stream for n in self.headers if n in self.placements and self.placements[n].stream]

    def _bytes(self, name):
        """Return the bytes that a model's weights take on the device."""
        encoders, run = self.settings.conditioning.encoders, self.runtime
        if name in encoders:
            return encoders[name].bytes(self.dir)
        if name in self.headers:
            return device_bytes(self.headers[name], run.dtype, self.fp8, run.stream_blocks)
        numel = sum(e.numel for f in self.files(name) for e in read_header(f)[0].values())
        return numel * (4 if name == "vae" else run.dtype.itemsize)

    # ---- loading -------------------------------------------------------------------------------------------------
    def _load(self, name, need):
        """Load a model and return its Placement. need: bytes that the model and its activations take on the device. If
        a GPU has fewer bytes free, a text encoder that is not trained is streamed.
        """
        run, encoders = self.runtime, self.settings.conditioning.encoders
        if name in self.headers:
            return self._load_dit(name)
        if name == "text":
            streamed = run.cuda and free_memory(run.device) < need and not self.trains_text
            model = load_t5(self.dir, "cpu" if streamed else run.device, run.dtype, self.text_encoder)
            return Placement(model, self.copier, len(model.blocks) if streamed else 0).start()
        if name == "vae":
            # fp32 is the official precision; bf16 harms the encoder, but not the decoder, whose memory it halves
            model = load_vae(self.dir, run.device, torch.float32)
            model = model.decode_in(run.dtype) if run.cuda else model
        else:
            model = encoders[name].load(encoders[name].path(self.dir), run.device)
        return Placement(model, self.copier).start()

    def _load_dit(self, name):
        """Load a DiT and return its Placement. Three things are done before the weights are loaded: the adapter is
        added, the DiT is split over the ranks, and host memory is allocated for the weights that stay on the host.
        """
        run = self.runtime
        dit = build_dit(self.headers[name], self.folder(name), run.dtype)
        if self.fp8:  # all of the blocks' linears, or those that the file has in 8 bits
            fp8.convert(dit, linears_in_fp8(self.headers[name]))
        dit.checkpointing = self.checkpointing
        if self.adapter and name in self.adapter.experts:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.adapter.seed + (name == "low"))
                self.adapter.inject(dit, run.device)
            kept = self.adapters.setdefault(name, adapter(dit))
            for module, layer in lora_layers(dit).items():  # those of the first load, if the DiT is loaded again
                layer.lora_A, layer.lora_B = kept[module]
        parallelize(dit, self.world)

        part = Placement(dit, self.copier, run.stream_blocks)
        share = self.world.host_share() if run.stream_blocks or run.cuda and self.settings.is_moe else None
        is_first, part.shared = share is None or share.is_first, bool(share)

        def memory_of_all():
            return shared_buffer(share.path_of(name), part.nbytes(whole=True), run.device, create=is_first)

        if share and is_first:
            part.settle(True, memory_of_all())
        elif is_first:
            part.settle(self.takes_turns and has_host_room(part))
        load_weights(dit, self.headers[name], run.device if is_first else "meta", run.dtype, keep_fp32)
        for file, weight, experts in self.loras:
            if name in experts:
                merge_file(dit, file, weight, name)
        if self.world.is_main and (error := fp8.report(dit)):
            print(f"{self.folder(name)}: {error}")
        if share:  # the shared memory is unlinked once every rank has mapped it; it is freed with the last rank
            share.barrier()
            if not is_first:
                part.settle(True, memory_of_all())
            share.barrier()
            if is_first:
                share.path_of(name).unlink()
        part.start()

        if run.compile == "blocks":  # the blocks are alike, so they are compiled once
            for block in dit.blocks:
                block.compile()
        elif run.compile == "graphs":
            dit.compile(mode="reduce-overhead")
        return part

    # ---- inputs of the models ------------------------------------------------------------------------------------
    @torch.no_grad()
    def encode_prompts(self, prompts, encoder=None):
        """Encode prompts (list of str) -> (embeddings (B,S,D), lens (B,)). encoder: a text encoder (default: the
        pipeline's). Prints which prompts are too long to be read in full.
        """
        encoder = encoder or self.acquire("text")
        tokenizer = encoder.tokenizer
        for prompt in dict.fromkeys(prompts):
            count = len(tokenizer.ids(tokenizer.clean(prompt))) + 1  # plus the end token
            if count > tokenizer.length and self.world.is_main:
                print(f"prompt {prompt[:40]!r}...: {count} tokens, of which the first {tokenizer.length - 1} are read")
        # one prompt at a time, so that an embedding does not depend on the other prompts
        return pad_embeddings([encoder.encode([p])[0][0] for p in prompts])

    def guidance_mode(self, tokens, batch=1):
        """Return how guidance computes its predictions for the prompt and for the negative prompt: "parallel", on two
        ranks (--guidance_parallel); "batched", in one forward pass; or "sequential", in two forward passes. Without
        --guidance_parallel, the result is "batched" if the model supports it and memory is large enough for it. tokens:
        number of tokens of a clip. batch: number of clips.
        """
        if self.world.cfg_size == 2:
            return "parallel"
        if not self.settings.parts.model.batches_guidance:
            return "sequential"
        need = 2 * activation_bytes(self.config().dim, tokens // self.world.sp_size, batch)
        if not any(part.is_on(self.device) for name, part in self.placements.items() if name in self.headers):
            need += self._bytes(self.settings.expert_names[0]) + (1 << 28)  # plus the other memory in use on the device
        return "batched" if self.world.all_ranks(free_memory(self.device) > need, "sp") else "sequential"


def has_host_room(part):
    """Return whether the host has room for the weights of a Placement, or holds them already."""
    missing = part.nbytes(whole=True)
    return not missing or free_memory("cpu") > missing + ROOM


def pad_embeddings(embeddings):
    """Stack embeddings, a list of (S,D), padded with zeros -> (B,S,D), and their lengths (B,)."""
    lens = torch.tensor([len(e) for e in embeddings], device=embeddings[0].device)
    return torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True), lens
