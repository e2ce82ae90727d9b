"""Read LoRA files of every layout in use for Wan into {parameter name: Change} (formats/changes.py), and write them.

The layouts are those of ComfyUI, kohya and musubi-tuner, diffusers and PEFT, DiffSynth, ai-toolkit, lightx2v and
LyCORIS. One function, `official_name`, translates the names of all of them.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from lora import base_name, change_norm, merge
from nanowan.errors import BadInput
from nanowan.formats.changes import OTHER_FORMS, Change, Dora, is_product, read, scaled
from nanowan.formats.header import Entry, hash_of, read_header, save
from nanowan.formats.layouts import DIFFUSERS_NAMES

# ---- names -------------------------------------------------------------------------------------------------------
INJECTORS = [f"audio_injector.injector.N.{p}" for p in ("q", "k", "v", "o", "norm_q", "norm_k")]
# kohya and LyCORIS write dots as underscores, so all names are compared with underscores in place of dots
OFFICIAL = {name.replace(".", "_"): name for name in (*DIFFUSERS_NAMES, *INJECTORS)}
OFFICIAL |= {theirs.replace(".", "_"): ours for ours, theirs in DIFFUSERS_NAMES.items()}
# In diffusers, Animate-2's attention modules have their official names, and the projections in them have the names
# that they have in diffusers' other models
OFFICIAL |= {
    re.sub(r"\w+_attn\.\w+$", f"{ours.split('.')[2]}.{theirs.split('.', 3)[3]}", ours).replace(".", "_"): ours
    for ours, theirs in DIFFUSERS_NAMES.items()
    if "_attn." in ours
}
# further modules of Animate and S2V, which are read under their official names only
ROOTS = ("audio_injector", "casual_audio_encoder", "cond_encoder", "trainable_cond_mask")
ROOTS += ("frame_packer", "pose_patch_embedding", "motion_encoder", "face_encoder", "face_adapter")

PREFIXES = re.compile(
    r"(?:(?:base_model|model|diffusion_model|pipe)\.|(transformer(?:_[12])?|dit2?)\.)*(?:lora_unet__?|lycoris_)?"
)
ENDINGS = re.compile(
    r"(.+)\.(lora_A|lora_B|lora[_.]down|lora[_.]up|alpha|diff|diff_b|diff_m|lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|"
    r"hada_t[12]|[ab][12]|oft_blocks|rescale|oft_R|dora_scale|lora_magnitude_vector|ids)"
    r"(?:\.default|\.\w+(?=\.weight))?(?:\.weight)?"  # PEFT may put its name for the adapter in between
)
PARTS = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
PARTS |= {"diff_b": "diff", "diff_m": "diff"}
# ComfyUI's names of the text encoder's weights are this prefix followed by transformers' names
TEXT_PREFIX = re.compile(r"text_encoders\.(?:umt5xxl\.)?transformer\.")
TEXT_TABLE = "shared.weight"  # the token embeddings
LOW_NOISE = ("transformer_2", "dit2")  # names of the low-noise expert in files that hold both experts

# endings that also occur in files other than LoRAs
SHARED_ENDINGS = {"alpha", "rescale", "a1", "a2", "b1", "b2", "ids"}

# Kinds of LoRA files that are refused: {pattern in a key: kind}
REFUSED = {
    r"lora_(B|up)(\.default)?\.bias": "a LoRA with biases of its own (lora_bias)",
    r"lora_mid|lokr_t[12]": "in a Tucker decomposition",
    r"boft_[Rs]": "a BOFT",
    r"\.oft_r": "an OFT of PEFT before 0.16",
    r"lora_embedding_": "a LoRA of an embedding",
}
# PEFT's settings that are refused: with them, the change is not scale * B A with one rank and scale for all modules
PEFT_OPTIONS = ("alpha_pattern", "rank_pattern", "layer_replication", "alora_invocation_tokens", "use_qalora")
PEFT_OPTIONS += ("use_bdlora", "arrow_config", "kasa_config", "monteclora_config")
# PEFT's initialisations that also change the base model
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
IMAGE_BRANCH = re.compile(r"img_emb\.|blocks\.\d+\.cross_attn\.(k_img|v_img|norm_k_img)\.")


MODELS = {"dit": "a DiT", "text": "the text encoder"}


class Place(NamedTuple):
    component: str | None  # prefix that names the model in a file for several models, such as transformer_2
    parameter: str
    part: str  # A, B, alpha, diff, lokr_w1, lokr_w1_a ...


def official_name(key):
    """Return the Place (component, parameter, part) that a key of a LoRA file names, or None if the key belongs to
    neither a DiT nor the text encoder. For a key of the text encoder, the component is "text", and the parameter has
    transformers' name.
    """
    m = ENDINGS.fullmatch(key.replace("_orig_mod.", ""))
    if not m:
        return None
    name, part = m.groups()
    if text := TEXT_PREFIX.match(name):
        return Place("text", f"{name[text.end() :]}.weight", PARTS.get(part, part))
    prefix = PREFIXES.match(name)
    name = re.sub(r"^(blocks[._]\d+[._])block[._]", r"\1", name[prefix.end() :])  # Animate-2's official names
    numbered = re.fullmatch(r"(blocks|audio_injector_injector)_(\d+)(.*)", name.replace(".", "_"))
    flat = "{}_N{}".format(*numbered.group(1, 3)) if numbered else name.replace(".", "_")
    if flat in OFFICIAL:
        name = OFFICIAL[flat].replace("N", numbered.group(2) if numbered else "")
    elif name.split(".")[0] not in ROOTS:
        return None
    leaf = {"diff_b": ".bias", "diff_m": ".modulation"}.get(part, ".weight")
    return Place(prefix.group(1), name if name.endswith(".modulation") else name + leaf, PARTS.get(part, part))


# ---- what a file's tensors are -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class LowRank(Change):
    """LoRA (Hu et al., 2021): scale * B A, where A and B are the tensors `a` and `b`."""

    a: Entry  # (r,in), or (r,in,...) for a convolution
    b: Entry  # (out,r) or (out,r,1,...)
    scale: float
    form = "low rank"

    @classmethod
    def matches(cls, shapes):
        a, b = (shapes.get(part, ()) for part in "AB")
        return shapes.keys() == {"A", "B"} and is_product(b, a) and math.prod(b[2:]) == 1

    @classmethod
    def made_of(cls, parts, alpha, peft):
        rank = parts["A"].shape[0]
        alpha = peft.get("lora_alpha", rank) if alpha is None else alpha
        return cls(parts["A"], parts["B"], alpha / (math.sqrt(rank) if peft.get("use_rslora") else rank))

    @property
    def rank(self):
        return self.a.shape[0]

    @property
    def shape(self):
        return (self.b.shape[0], *self.a.shape[1:])

    def factors(self):
        return read(self.a).flatten(1), read(self.b).flatten(1) * self.scale

    def of(self, weight):
        a, b = (t.to(weight.device) for t in self.factors())
        return (b @ a).view(weight.shape)

    def saved(self, leaf, strength):
        scale = self.scale * strength
        return [("lora_A.weight", self.a.read()), ("lora_B.weight", scaled(self.b, scale))]

    def norm(self):
        """Return the Frobenius norm of the change, without forming the change."""
        return change_norm(*(t.double() for t in self.factors()), 1.0).item()


FORMS = (LowRank, *OTHER_FORMS)
NORMS = ("dora_scale", "lora_magnitude_vector")  # parts with a DoRA's norms: LyCORIS' (out,1) or (1,in), PEFT's (out)


def form_of(parts):
    """Return the class in FORMS whose layout these tensors {part: Entry} match, or None. A DoRA's norms are ignored."""
    shapes = {part: e.shape for part, e in parts.items() if part not in ("alpha", *NORMS)}
    numbers = all(e.dtype.is_floating_point != (part == "ids") for part, e in parts.items() if part != "alpha")
    if not numbers or "alpha" in parts and parts["alpha"].numel != 1 or len(parts.keys() & {*NORMS}) > 1:
        return None
    return next((form for form in FORMS if form.matches(shapes)), None)


def change_of(parts, alpha=None, peft=None):
    """Return the Change made from the tensors {part: Entry}. alpha: the alpha in the file, or None if the file has
    none. peft: the contents of adapter_config.json if PEFT wrote the file, else None or {}.
    """
    inner = form_of(parts).made_of(parts, alpha, peft or {})
    if "lora_magnitude_vector" in parts:
        return Dora(inner, parts["lora_magnitude_vector"], 0)
    if "dora_scale" in parts:
        norms = parts["dora_scale"]
        return Dora(inner, norms, 1 if norms.shape[0] == 1 else 0)
    return inner


# ---- reading -----------------------------------------------------------------------------------------------------
@dataclass
class Listing:
    """The contents of a LoRA file's header. halves: {"high" | "low" | "text": {parameter: {part: Entry}}}. If
    the file is for both experts, `halves` has the keys "high" and "low"; if it is for the text encoder, "text"; if it
    is for a single DiT, "high", unless the file's keys name the low-noise expert. problem: the reason why the file is
    refused, or None.
    """

    path: Path
    metadata: dict
    halves: dict
    peft: dict  # {"high" | "low": PEFT's settings}
    expert: str | None  # the expert that the keys name: "high", "low" or "both"; None if they name none
    problem: str | None

    @property
    def model(self):
        """The model that the file changes: "dit", or "text" for the text encoder."""
        return "text" if "text" in self.halves else "dit"

    def half(self, expert):
        """Return the key under which `halves` holds the changes for `expert`. If there is only one key, it is returned
        for any `expert`. Raises BadInput if the file is for both experts and `expert` names neither of them.
        """
        if len(self.halves) == 2 and expert not in self.halves:
            raise BadInput(f"{self.path}: holds both experts of an A14B; add :high or :low to choose one")
        return expert if len(self.halves) == 2 else next(iter(self.halves))

    def changes(self, expert):
        """Return {parameter name: Change} of this expert's half (see `half`)."""
        half = self.half(expert)
        return {name: self._change(name, parts, self.peft.get(half) or {}) for name, parts in self.halves[half].items()}

    def _change(self, name, parts, config):
        alpha = parts["alpha"].read().float().item() if "alpha" in parts else None
        if alpha is not None and not math.isfinite(alpha):
            raise BadInput(f"{self.path}: the alpha of {name} is {alpha}; expected a number")
        return change_of(parts, alpha, config)


def list_lora(path):
    """Read a file's header and return its Listing, or None if none of its keys belongs to a LoRA or a related adapter.
    No tensors are read.
    """
    entries, metadata = read_header(path)
    parts, unknown, twice, components = {}, [], [], set()
    for key, entry in entries.items():
        if (place := official_name(key)) is None:
            unknown.append(key)
            continue
        components.add(place.component)
        name = "low" if place.component in LOW_NOISE else "text" if place.component == "text" else "high"
        half = parts.setdefault(name, {})
        tensors = half.setdefault(place.parameter, {})
        twice += [key] if place.part in tensors else []
        tensors[place.part] = entry
    variants = {why for pattern, why in REFUSED.items() if any(re.search(pattern, key) for key in unknown)}
    variants |= {
        "a BOFT"
        for half in parts.values()
        for p in half.values()
        if "oft_blocks" in p and len(p["oft_blocks"].shape) == 4
    }
    endings = {m.group(2) for key in unknown if (m := ENDINGS.fullmatch(key))}
    if not parts and not variants and endings <= SHARED_ENDINGS:
        return None
    broken = [name for half in parts.values() for name, tensors in half.items() if not form_of(tensors)]
    problem = None
    if variants:
        problem = f"is {' and '.join(sorted(variants))}, which is not read here"
    elif "text" in parts and len(parts) > 1:
        problem = "changes a DiT and the text encoder; give them as two files"
    elif unknown:
        problem = f"{len(unknown)} keys are unknown here, such as {unknown[0]}"
    elif twice:
        problem = f"{len(twice)} keys are there twice under different names, such as {twice[0]}"
    elif broken:
        problem = (
            f"{len(broken)} changes are not whole, or their tensors do not fit together, such as that of {broken[0]}"
        )
    expert = "both" if len(parts) == 2 and "text" not in parts else None
    if expert is None and components <= {"transformer_1", *LOW_NOISE}:
        expert = next(iter(parts), None)
    listing = Listing(Path(path), metadata, parts, {}, expert, problem)
    if problem is None:
        beside = any(key.startswith("base_model.") for key in entries)
        if Path(path).stem == "adapter_model" and metadata.get("alpha_folded") != "True":  # PEFT's file name
            beside |= Path(path).with_name("adapter_config.json").is_file()
        listing.peft, listing.problem = _peft_config(listing, beside)
    return listing


def _peft_config(listing, beside):
    """Return ({"high" | "low": PEFT's settings}, problem). problem: the reason why the file is refused, or None. If
    diffusers wrote the LoRA file, these settings are in its metadata; if PEFT itself wrote it, they are in the
    adapter_config.json in the same folder. beside: whether an adapter_config.json there belongs to this LoRA file.
    """
    path, source = listing.path, listing.path
    changes, config = [parts for half in listing.halves.values() for parts in half.values()], {}
    needed = any(not parts.keys() & {"alpha", "diff"} for parts in changes)
    has = {part for parts in changes for part in parts}
    try:
        if "lora_adapter_metadata" in listing.metadata:
            config = json.loads(listing.metadata["lora_adapter_metadata"])
        elif beside and needed or "oft_R" in has:
            source = path.with_name("adapter_config.json")
            config = json.loads(source.read_text())
        by_component = {}
        for key, value in config.items():
            component, _, key = key.rpartition(".")
            by_component.setdefault(component, {})[key] = value
    except (ValueError, OSError, AttributeError) as e:
        return {}, f"its alpha should stand in {source.name}, which cannot be read ({e})"
    options = PEFT_OPTIONS + (() if has & {*NORMS} else ("use_dora",))
    for settings in by_component.values():
        if used := [name for name in options if settings.get(name)]:
            return {}, f"uses PEFT's {used[0]}, which is not read here"
        start = str(settings.get("init_lora_weights"))
        if start.lower().startswith(BASE_CHANGING):
            return {}, (
                f"belongs to a base that init_lora_weights {start!r} changed, and means nothing on another one; have "
                "PEFT convert it when it saves (path_initial_model_for_weight_conversion)"
            )
        by_r = has & {"lokr_w1", "lokr_w1_a", "hada_w1_a"}
        required = {"lora_alpha": settings.get("use_rslora"), "alpha": by_r, "r": by_r, "eps": settings.get("coft")}
        for name in required:
            value = settings.get(name)
            if not isinstance(value, int | float) and (required[name] or value is not None):
                return {}, f"its {name} is {value!r}; expected a number"
    low = [c for c in by_component if c in LOW_NOISE]
    others = [c for c in by_component if c not in LOW_NOISE]
    high, low = (by_component.get((names or [None])[0]) for names in (others or low, low or others))
    return {"high": high, "low": low}, None


def read_listing(path, model="dit"):
    """Return the Listing of a file that changes `model`, "dit" or "text". Raises BadInput if the file cannot be read or
    changes another model.
    """
    listing = list_lora(path)
    if listing is None:
        raise BadInput(f"{path}: not a LoRA, it has none of its keys (lora_A, lora_down, lokr_w1, diff, ...)")
    if listing.problem:
        raise BadInput(f"{path}: {listing.problem}")
    if listing.model != model:
        raise BadInput(f"{path}: a LoRA of {MODELS[listing.model]}, where one of {MODELS[model]} is wanted")
    return listing


def kind_of_lora(path):
    """Return the model that a LoRA file changes: "dit" or "text". Raises BadInput if the file is no LoRA or cannot be
    read.
    """
    listing = list_lora(path)
    return listing.model if listing and not listing.problem else read_listing(path).model


def read_lora(path, expert=None):
    """Return ({parameter name: Change}, metadata) of a LoRA file in any of the known layouts.

    expert: "high" or "low": whose changes to read if the file is for both experts. Raises BadInput if any key is
    unknown or any change is of an unsupported kind, so that a file is never loaded in part. Tensors stay in the file
    until a change is used.
    """
    listing = read_listing(path)
    return listing.changes(expert), listing.metadata


def describe(path):
    """Return a description of a LoRA file, from its header alone, or None for a file that is not a LoRA:

    {"model": "dit" or "text", "forms": {"low rank" | "kron" | "DoRA" | ...: number of changes}, "ranks": {rank: number
    of changes}, "targets": {module in a block: number of changes}, "blocks": indices of the changed blocks,
    "elsewhere": names of the changed parameters outside the blocks, "image_keys": number of tensors for Wan 2.1's
    image branch, "alpha_keys": number of alphas, "expert" and "expert_from": the pair that expert_of returns,
    "problem": the reason why the file is refused, or None, "metadata"}
    """
    listing = list_lora(path)
    if listing is None:
        return None
    changes = [(name, parts) for half in listing.halves.values() for name, parts in half.items()]
    forms = Counter("DoRA" if p.keys() & {*NORMS} else getattr(form_of(p), "form", "broken") for _, p in changes)
    places = [re.match(r"(?:encoder\.)?blocks?\.(\d+)\.(.+?)(\.weight)?$", name) for name, _ in changes]
    expert, source = expert_of(path, listing.metadata, listing.expert and (listing.expert, "its keys"))
    return {
        "model": listing.model,
        "forms": dict(forms),
        "ranks": dict(Counter(p["A"].shape[0] for n, p in changes if p.get("A") and p["A"].shape and n != TEXT_TABLE)),
        "targets": dict(Counter(m.group(2) for m in places if m)),
        "blocks": sorted({int(m.group(1)) for m in places if m}),
        "elsewhere": sorted({name for (name, _), m in zip(changes, places) if not m}),
        "image_keys": sum(len(p) for name, p in changes if IMAGE_BRANCH.match(name)),
        "alpha_keys": sum("alpha" in p for _, p in changes),
        "expert": expert,
        "expert_from": source,
        "problem": listing.problem,
        "metadata": listing.metadata,
    }


# ---- which expert ------------------------------------------------------------------------------------------------
class LoraSpec(NamedTuple):
    file: str
    weight: float
    expert: str | None  # "high", "low", "both", or None if not given


def parse_lora_spec(text, flag="--lora"):
    """Parse FILE[:weight][:high|low|both] into a LoraSpec. flag: the flag that error messages name."""
    fields, weight = text.split(":"), 1.0
    expert = fields.pop() if len(fields) > 1 and fields[-1] in ("high", "low", "both") else None
    if len(fields) > 1:
        try:
            weight = float(fields[-1])
            fields.pop()
        except ValueError:
            pass  # the colon is part of the file's name
    if not math.isfinite(weight):
        raise BadInput(f"{flag} {text}: a weight of {weight}; give a number")
    return LoraSpec(":".join(fields), weight, expert)


# Patterns that find the expert in a file's name, which is first put in lower case, with its words joined by "_"
LEVELS = {"high": "high", "hn": "high", "h": "high", "高": "high", "low": "low", "ln": "low", "l": "low", "低": "low"}
MODEL = r"(?:wan[\d_]*|w?2_?2|a?14b|ti2v|[tis]2v)"
VERSION = r"(?:(?:v|e|ep|epochs?|s|steps?|fp|bf)?_?\d+(?:steps?|epochs?)?(?![a-z0-9])|e\dm\d)"
LAST = rf"(?:_(?:lora|model|final|last|ema|{MODEL}))*_?$"
EXPERT_IN_NAME = (
    r"_(high|low|h|l)_?noise(?=_|\d|$)",
    r"_noise_?(high|low|h|l)(?=_|$)",
    rf"_(high|low|hn|ln)(?=_?{VERSION}|{LAST})",
    rf"_(h|l)(?=_{VERSION}|{LAST})",
    rf"{MODEL}_?(hn|ln|h|l)(?=_|$)",
    r"(高|低)噪",
)
BOTH_IN_NAME = r"_(high|hn|h)(_(and|n|plus|or))?_(low|ln|l)(?=_|$)|_(low|ln|l)(_(and|n|plus|or))?_(high|hn|h)(?=_|$)"
COMPOUNDS = ("thigh", "knee", "ankle", "waist", "sky", "junior", "senior")  # after these words, "high" names no expert


def expert_in_name(path):
    """Return the expert that a file's name mentions, "high" or "low", or None if it mentions neither or both.

    Next to the word "noise", the words high, low, H and L mention an expert. Elsewhere, the words high, low, HN, LN, H
    and L do so only at the end of the name or before a number or version (x_HIGH, style-H-e8). HN, LN, H and L also do
    so directly after the model's name (wan22_h_style). high_heels mentions no expert.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", Path(path).stem)
    words = "_" + re.sub(r"[\W_]+", "_", words).lower()
    if re.search(BOTH_IN_NAME, words):
        return None
    matches = [m for pattern in EXPERT_IN_NAME for m in re.finditer(pattern, words)]
    said = {LEVELS[m[1]] for m in matches if words[: m.start()].rpartition("_")[2] not in COMPOUNDS}
    return said.pop() if len(said) == 1 else None


def expert_of(path, metadata, chosen=None):
    """Return the expert of an A14B for which a file was made, and the source of this information: ("high" | "low" |
    "both", source), or (None, None) if the expert is unknown. chosen: such a pair, which takes precedence over the
    file's metadata and name, or None.
    """
    if chosen:
        return chosen
    if metadata.get("expert") in ("high", "low"):
        return metadata["expert"], "its metadata"
    expert = expert_in_name(path)
    return (expert, "its name") if expert else (None, None)


def choose_experts(spec, experts, flag="--lora"):
    """Return (names of the DiTs that a LoRA file is for, source). source: which of "its keys", "its metadata" and "its
    name" decided this, or None.

    spec: LoraSpec. experts: the names of the available DiTs: "high", "low" or both for an A14B, or one other name for
    a model with a single DiT. For such a model, an expert in the file's name is ignored. If only one DiT is available,
    a file whose expert is unknown is for this DiT. Raises BadInput if the expert is unknown and two DiTs are available,
    or if the file is for an expert that is not available.
    """
    listing = read_listing(spec.file)
    keys = (listing.expert, "its keys") if listing.expert else None
    chosen = (spec.expert, "the flag") if spec.expert else keys
    expert, source = expert_of(spec.file, listing.metadata, chosen)
    single = not {"high", "low"} & set(experts)
    if expert is None and len(experts) == 1 or single and source in (None, "its name"):
        return set(experts), None
    if expert is None:
        raise BadInput(
            f"{flag} {spec.file}: for which expert? Neither its metadata nor its name says; add :high, :low or :both"
        )
    wanted = {"high", "low"} if expert == "both" else {expert}
    if source == "its keys" and not single and expert == "both":  # each half goes to its expert, if that is available
        wanted &= set(experts)
    if not wanted <= set(experts):
        here = "a single model" if single else f"only {', '.join(experts)}"
        what = f"the {' and '.join(sorted(wanted))}-noise expert of an A14B"
        says = "say" if source == "its keys" else "says"
        raise BadInput(f"{flag} {spec.file}: made for {what}, as {source} {says}, and here is {here}")
    return wanted, None if spec.expert else source


def left_out(changes, shapes):
    """Return {parameter name: reason} of the changes that a model cannot use and that other programs skip as well.
    These are changes of Wan 2.1's image branch, if the model has no image branch, and a change of the patch embedding
    that is made for another number of input channels.
    """
    skipped, patch = {}, "patch_embedding.weight"
    if not any(IMAGE_BRANCH.match(name) for name in shapes):
        skipped = {n: "of an image branch, which this model does not have" for n in changes if IMAGE_BRANCH.match(n)}
    if patch in changes and patch in shapes and not changes[patch].fits(shapes[patch]):
        (width, channels, *kernel), shape = shapes[patch], changes[patch].shape
        theirs, rest = divmod(math.prod(shape[1:]), math.prod(kernel))
        if shape[0] == width and not rest:
            skipped[patch] = f"of a patch embedding for {theirs} channels, where this model has {channels}"
    return skipped


def check_fit(path, changes, shapes):
    """Return the changes to apply to a model: all except those that left_out returns. Raises BadInput if one of them
    fits no parameter of the model, or if there are none.

    changes: {parameter name: Change} of the file `path`. shapes: {parameter name: shape} of the model.
    """
    skipped = left_out(changes, shapes)
    taken = {name: change for name, change in changes.items() if name not in skipped}
    if not taken:
        raise BadInput(f"{path}: does not fit this model: only changes {', '.join(sorted(set(skipped.values())))}")

    def times(shape):
        return "x".join(map(str, shape))

    bad = [
        f"{name} ({times(c.shape)} for {times(shapes[name]) if name in shapes else 'no such parameter'})"
        for name, c in taken.items()
        if not (name in shapes and c.fits(shapes[name]))
    ]
    if bad:
        raise BadInput(f"{path}: does not fit this model: {len(bad)} of {len(changes)} changes, {', '.join(bad[:3])}")
    return taken


def merge_file(model, path, weight=1.0, expert=None):
    """Merge a LoRA file into a model, in place, with lora.merge. expert: "high" or "low": whose changes to merge if
    the file is for both experts. Raises BadInput, before anything is changed, for files that read_lora or check_fit
    refuses, and for files with a change that is not of low rank for a weight that the model holds in 8 bits.
    """
    changes, shapes = read_lora(path, expert)[0], {base_name(n): p.shape for n, p in model.named_parameters()}
    taken = check_fit(path, changes, shapes)
    try:
        merge(model, taken, weight)
    except ValueError as e:
        raise BadInput(f"{path}: {e}") from None
    for reason, count in Counter(left_out(changes, shapes).values()).items():
        print(f"{path}: skipped {count} change{'s' * (count > 1)} {reason}")


def changes_to_start_from(pairs, path, expert=None):
    """Return {module name: Change} of the LoRA file from which an adapter is to start. pairs: the adapter {module name:
    (A, B)}, whose tensors may be on the meta device. Raises BadInput unless the file changes exactly the modules that
    the adapter changes, with the same ranks.
    """
    changes = {name.removesuffix(".weight"): change for name, change in read_lora(path, expert)[0].items()}
    want = {name: (tuple(b.shape[:1] + a.shape[1:]), len(a)) for name, (a, b) in pairs.items()}
    have = {name: (tuple(c.shape), getattr(c, "rank", None)) for name, c in changes.items()}
    if want != have:
        odd = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
        raise BadInput(
            f"--init_lora {path}: {len(odd)} modules differ from what --targets, --blocks and --rank ask for, such as "
            f"{odd[0]}: shape and rank are {have.get(odd[0], 'not there')}, asked for are {want.get(odd[0], 'none')}"
        )
    return changes


@torch.no_grad()
def start_from(pairs, path, scale, expert=None):
    """Set an adapter {module name: (A, B)}, whose dW is scale * B A, to the dW of a LoRA file. Raises BadInput for the
    same files as changes_to_start_from.
    """
    changes = changes_to_start_from(pairs, path, expert)
    for name, (a, b) in pairs.items():
        start_a, start_b = changes[name].factors()
        a.copy_(start_a)
        b.copy_(start_b / scale)


# ---- writing -----------------------------------------------------------------------------------------------------
# Names of base models in LoRA managers: SwarmUI's id, which is the same for all 14B models, and CivitAI's label, which
# does not exist for S2V and Animate
MANAGERS_14B = "wan-2_1-text2video-14b"
MANAGERS_NAMES = {
    "ti2v-5B": ("wan-2_2-ti2v-5b", "Wan Video 2.2 TI2V-5B"),
    "t2v-A14B": (MANAGERS_14B, "Wan Video 2.2 T2V-A14B"),
    "i2v-A14B": (MANAGERS_14B, "Wan Video 2.2 I2V-A14B"),
}


@dataclass(frozen=True)
class AdapterInfo:
    """Facts about an adapter's training that its file tells LoRA managers.

    variant: the base model, a key of VARIANTS. date: ISO 8601. trained_words: {word: number of files with the word in
    their captions}. resolution: (width, height) px. steps: planned number of steps. batch: samples per rank and
    micro-batch. total_batch: samples per optimizer step, over all ranks and the micro-batches of --accumulate.
    """

    variant: str | None = None
    date: str | None = None
    trained_words: dict = field(default_factory=dict)
    resolution: tuple | None = None
    steps: int | None = None
    learning_rate: float | None = None
    batch: int | None = None
    total_batch: int | None = None

    def metadata(self):
        """Return the metadata {name: value} under the names that kohya's scripts and the ModelSpec standard use."""
        values = {
            "variant": self.variant,
            "modelspec.date": self.date,
            "modelspec.resolution": self.resolution and "{}x{}".format(*self.resolution),
            "ss_max_train_steps": self.steps,
            "ss_learning_rate": self.learning_rate,
            "ss_batch_size_per_device": self.batch,
            "ss_total_batch_size": self.total_batch,
        }
        if self.variant:
            names = MANAGERS_NAMES.get(self.variant, (MANAGERS_14B, f"wan2.2-{self.variant}"))
            architecture, values["ss_base_model_version"] = names
            values["modelspec.architecture"] = f"{architecture}/lora"
        if self.trained_words:
            values["trained_words"] = values["modelspec.trigger_phrase"] = ", ".join(self.trained_words)
            values["ss_tag_frequency"] = json.dumps({"captions": self.trained_words}, ensure_ascii=False)
        return {k: v for k, v in values.items() if v is not None}


def save_adapter(path, tensors, metadata):
    """Write an adapter's tensors with this metadata, and with further metadata by which LoRA managers identify the
    file: a title, which is the file's name, and hash_of(tensors), whose first 12 digits are the AutoV3 hash.
    """
    digest = hash_of(tensors)
    hashes = {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    metadata = {k: v for k, v in metadata.items() if k != "sshs_legacy_hash"} | hashes
    metadata |= {"format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": Path(path).stem}
    save(path, tensors, metadata | {"ss_output_name": Path(path).stem})


def write_lora(path, pairs, scale=1.0, info=None, **metadata):
    """Write an adapter {module name: (A, B)} whose dW is scale * B A, under the names that ComfyUI and diffusers read.

    info: AdapterInfo, or None. metadata: further entries for the file's metadata, to which the adapter's rank, targets
    and blocks are added. Equal adapters with equal metadata give equal files.
    """
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = a
        tensors[f"diffusion_model.{name}.lora_B.weight"] = b * scale
    rank = len(next(iter(pairs.values()))[0])
    parts = [re.match(r"blocks\.(\d+)\.(.+)|(audio_injector)\.injector\.\d+\.(.)", name).groups() for name in pairs]
    metadata |= (info or AdapterInfo()).metadata() | {
        "rank": rank,
        "alpha": scale * rank,
        "alpha_folded": True,
        "targets": ",".join(sorted({target or f"{owner}.{leaf}" for _, target, owner, leaf in parts})),
        "blocks": ",".join(map(str, sorted({int(block) for block, *_ in parts if block}))),
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.2",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": scale * rank,
    }
    if "step" in metadata:
        metadata["ss_steps"] = metadata["step"]
    save_adapter(path, tensors, metadata)


LORA_LAYOUTS = ("comfyui", "musubi")
KOHYA_PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def write_changes(path, changes, metadata, factors=None, layout="comfyui"):
    """Write {parameter name: Change}, each multiplied by factors[name] (default 1), in one of LORA_LAYOUTS. Raises
    BadInput for a change that the layout cannot express, and for an OFT or DoRA with a factor other than 1.
    """
    tensors = {}
    for name, change in changes.items():
        module, _, leaf = name.rpartition(".")
        try:
            saved = dict(change.saved(leaf, (factors or {}).get(name, 1.0)))
        except ValueError as e:
            raise BadInput(f"{path}: {name} is not written: {e}") from None
        if layout == "musubi":
            module = f"lora_unet_{module.replace('.', '_')}"
            saved = {KOHYA_PARTS.get(part, part): t for part, t in saved.items()}
            saved |= {"alpha": torch.tensor(float(change.rank))} if change.form == "low rank" else {}
        else:
            module = f"diffusion_model.{module}"
        tensors |= {f"{module}.{part}": t for part, t in saved.items()}
    forms = {change.form if name.endswith(".weight") else "difference" for name, change in changes.items()}
    if layout == "musubi" and (len(forms) > 1 or not forms <= {"low rank", "kron", "hadamard"}):
        raise BadInput(
            f"{path}: musubi-tuner reads files of one kind, LoRA, LoHa or LoKr; this has {', '.join(sorted(forms))}"
        )
    save_adapter(
        path, tensors, {k: v for k, v in metadata.items() if k != "lora_adapter_metadata"} | {"alpha_folded": True}
    )
