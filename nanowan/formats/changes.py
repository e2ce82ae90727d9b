"""How an adapter file changes one parameter: LoKr, LoHa, GLoRA, OFT, DoRA, or a plain difference.

A Change is made from a few tensors, {part: Entry}. A part is a tensor's role, such as "A" or "oft_blocks", which
formats/lora.py finds in the tensor's key. LowRank, the Change for a plain LoRA, is defined there too. Some changes
depend on the weight that they change: they rotate it (OFT), mix its columns (GLoRA) or set the norms of its rows or
columns (DoRA). Sources: Yeh et al., 2023 (LoKr, LoHa, GLoRA); Qiu et al., 2023 (OFT); Liu et al., 2024 (DoRA). Formulas
and scales are those in the forward passes of lycoris-lora 4.1 and peft 0.21.
"""

import math
from dataclasses import dataclass

import torch

from nanowan.formats.header import Entry


def read(entry, device="cpu"):
    return entry.read().to(device, torch.float32)


def is_product(first, second):
    """Return whether factors with these two shapes can be multiplied as matrices, (n,r) by (r,m). Either shape may
    continue with the kernel size of a convolution.
    """
    return min(len(first), len(second)) >= 2 and 0 < first[1] == second[0]


class Change:
    """The change that an adapter file makes to one parameter. Its tensors stay in the file until it is computed.

    Subclasses define `form`, the name of their kind, and `shape`, which `fits` compares with the parameter's shape.
    Most also define `matches(shapes)`, which tells whether tensors with these shapes {part: shape} describe a change of
    this kind, and `made_of(parts, alpha, peft)`, which constructs the change from the arguments of change_of
    (formats/lora.py).
    """

    def of(self, weight):
        """Return the change, in fp32, for a parameter whose values are `weight`. The change has the shape and device of
        `weight`.
        """
        raise NotImplementedError  # each subclass computes the change of its kind

    def add_to(self, parameter, strength=1.0):
        """Add strength times this change to a parameter, in place. The sum is computed in fp32 and rounded once."""
        parameter.copy_(self.of(parameter).mul_(strength).add_(parameter))

    def factors(self):
        """Return the factors A (r,in) and B (out,r), fp32, with change = B A; None if the change is not of low rank."""

    def fits(self, shape):
        """Return whether this change can be applied to a parameter of this shape. Dimensions of size 1 are ignored, and
        the change of a convolution may be stored as a matrix (out,in*kernel).
        """
        ours, *theirs = ([n for n in s if n > 1] for s in (self.shape, shape, (shape[0], math.prod(shape[1:]))))
        return ours in theirs

    def saved(self, leaf, strength):
        """Return [(end of a tensor's key, tensor)]: the tensors with which ComfyUI applies `strength` times this
        change. leaf: the kind of parameter, "weight", "bias" or "modulation". Raises ValueError if no layout that
        ComfyUI reads can express this change with this strength.
        """
        raise ValueError(f"others read no {self.form} of this kind")


def scaled(entry, scale):
    """Return the tensor of an Entry multiplied by `scale`. If scale is 1, the tensor keeps its dtype; else the result
    is fp32.
    """
    return entry.read() if scale == 1 else read(entry) * scale


@dataclass(frozen=True)
class Kron(Change):
    """LoKr: scale * kron(w1, w2). w1 and w2 are tuples. A tuple of two Entries holds the factors (n,r) and (r,m) of a
    matrix. A tuple of one Entry holds a matrix (n,m) or, only in w2, the kernel (n,m,...) of a convolution.
    """

    w1: tuple
    w2: tuple
    scale: float
    form = "kron"

    @classmethod
    def matches(cls, shapes):
        shapes = dict(shapes)
        for w, most in ("lokr_w1", 2), ("lokr_w2", 5):
            pair = shapes.pop(f"{w}_a", ()), shapes.pop(f"{w}_b", ())
            whole = shapes.pop(w, None)
            if whole is None and not (is_product(*pair) and len(pair[0]) == len(pair[1]) == 2):
                return False
            if whole is not None and (pair != ((), ()) or not 2 <= len(whole) <= most):
                return False
        return not shapes

    @classmethod
    def made_of(cls, parts, alpha, peft):
        w1, w2 = (tuple(parts[k] for k in sorted(parts) if k.startswith(w)) for w in ("lokr_w1", "lokr_w2"))
        if peft:  # PEFT applies its scale always, LyCORIS only if w1 or w2 is a product
            return cls(w1, w2, peft["alpha"] / peft["r"])
        dim = next((w[1].shape[0] for w in (w2, w1) if len(w) == 2), None)
        return cls(w1, w2, 1.0 if alpha is None or dim is None else alpha / dim)

    @property
    def shape(self):
        (n1, m1), (n2, m2, *kernel) = (w[0].shape[:1] + w[-1].shape[1:] for w in (self.w1, self.w2))
        return (n1 * n2, m1 * m2, *kernel)

    def _read(self):
        parts = [[read(e) for e in w] for w in (self.w1, self.w2)]
        return (w[0] if len(w) == 1 else w[0] @ w[1] for w in parts)

    def factors(self):
        """Return A and B as Change.factors does. If w2 is a product a b, then kron(w1, a b) = kron(w1, a) kron(1, b).
        Return None if w2 is not a product, or if the rank of these factors is above half of the change's smaller side.
        """
        if len(self.w2) == 1 or 2 * self.w1[-1].shape[1] * self.w2[1].shape[0] > min(self.shape):
            return None
        w1, _ = self._read()
        a, b = (read(e) for e in self.w2)
        return torch.kron(torch.eye(w1.shape[1]), b), torch.kron(w1, a) * self.scale

    def of(self, weight):
        w1, w2 = (w.to(weight.device) for w in self._read())
        return torch.kron(w1.view(*w1.shape, *[1] * (w2.dim() - 2)), w2).mul_(self.scale).view(weight.shape)

    def saved(self, leaf, strength):
        w1, w2 = self._read()
        return [("lokr_w1", w1 * (self.scale * strength)), ("lokr_w2", w2)]

    def norm(self):
        w1, w2 = self._read()
        return abs(self.scale) * (w1.double().norm() * w2.double().norm()).item()


@dataclass(frozen=True)
class Hadamard(Change):
    """LoHa: scale * (a1 b1) * (a2 b2), where a1 b1 and a2 b2 are matrix products, and each * is elementwise. pairs: the
    tuples (a1, b1) and (a2, b2), with shapes (n,r) and (r,m). For a convolution, each tuple may instead be (a, b, t),
    with shapes (r,n), (r,m) and (r,r,...). Then einsum("ij...,in,jm->nm...", t, a, b) replaces the matrix product.
    """

    pairs: tuple
    scale: float
    form = "hadamard"

    @classmethod
    def matches(cls, shapes):
        names = [tuple(f"hada_{part.format(i)}" for part in ("w{}_a", "w{}_b", "t{}")) for i in (1, 2)]
        pairs = [[shapes[name] for name in pair if name in shapes] for pair in names]
        if len(shapes) != sum(map(len, pairs)) or len(pairs[0]) != len(pairs[1]) or len(pairs[0]) < 2:
            return False
        if len(pairs[0]) == 3:
            return (
                pairs[0] == pairs[1]
                and all(len(s) >= 2 for s in pairs[0])
                and 1 == len({pairs[0][0][0], pairs[0][1][0], *pairs[0][2][:2]})
            )
        return all(is_product(a, b) and len(a) == len(b) == 2 for a, b in pairs) and 1 == len(
            {(a[0], b[1]) for a, b in pairs}
        )

    @classmethod
    def made_of(cls, parts, alpha, peft):
        names = [[f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}"] for i in (1, 2)]
        pairs = tuple(tuple(parts[name] for name in pair if name in parts) for pair in names)
        rank = pairs[0][1].shape[0]
        scale = peft["alpha"] / peft["r"] if peft else 1.0 if alpha is None else alpha / rank
        return cls(pairs, scale)

    @property
    def shape(self):
        a, b, *t = (e.shape for e in self.pairs[0])
        return (a[1], b[1], *t[0][2:]) if t else (a[0], b[1])

    def of(self, weight):
        one, two = (self._product(*(read(e, weight.device) for e in pair)) for pair in self.pairs)
        return one.mul_(two).mul_(self.scale).view(weight.shape)

    @staticmethod
    def _product(a, b, t=None):
        return a @ b if t is None else torch.einsum("ij...,in,jm->nm...", t, a, b)

    def saved(self, leaf, strength):
        names = [f"hada_{part}" for part in ("w1_a", "w1_b", "t1", "w2_a", "w2_b", "t2")]
        entries = [e for pair in self.pairs for e in (*pair, None)[:3]]
        first = scaled(self.pairs[0][0], self.scale * strength)
        return [("hada_w1_a", first)] + [(n, e.read()) for n, e in list(zip(names, entries))[1:] if e is not None]


@dataclass(frozen=True)
class GLora(Change):
    """GLoRA: scale * (W a1 a2 + b1 b2), where W is the weight before the change. a1 (in,r), b1 (out,r), a2 and b2
    (r,in).
    """

    a1: Entry
    a2: Entry
    b1: Entry
    b2: Entry
    scale: float
    form = "GLoRA"

    @classmethod
    def matches(cls, shapes):
        if shapes.keys() != {"a1", "a2", "b1", "b2"} or any(len(s) != 2 for s in shapes.values()):
            return False
        a1, a2, b1, b2 = (shapes[part] for part in ("a1", "a2", "b1", "b2"))
        return is_product(a1, a2) and is_product(b1, b2) and a1[0] == a2[1] == b2[1]

    @classmethod
    def made_of(cls, parts, alpha, peft):
        scale = 1.0 if alpha is None else alpha / parts["b2"].shape[0]
        return cls(parts["a1"], parts["a2"], parts["b1"], parts["b2"], scale)

    @property
    def shape(self):
        return self.b1.shape[0], self.b2.shape[1]

    def of(self, weight):
        a1, a2, b1, b2 = (read(e, weight.device) for e in (self.a1, self.a2, self.b1, self.b2))
        return (weight.float() @ a1 @ a2).add_(b1 @ b2).mul_(self.scale)

    def saved(self, leaf, strength):
        scale = self.scale * strength
        tensors = scaled(self.a1, scale), self.a2.read(), scaled(self.b1, scale), self.b2.read()
        return [(f"{part}.weight", t) for part, t in zip(("a1", "a2", "b1", "b2"), tensors)]


@dataclass(frozen=True)
class Rotation(Change):
    """LyCORIS' OFT: the weight's rows are cut into k groups of s, and each group is multiplied from the left by
    (1 - q)(1 + q)^-1, where q = m - m^T for the group's matrix m in `blocks` (k,s,s). Then each row is multiplied by
    its number in `rescale` (out,1), unless that is None. constraint: the largest norm that the k matrices q, taken as
    one tensor, may have; 0: no limit.
    """

    blocks: Entry
    rescale: Entry | None
    constraint: float
    form = "OFT"

    @classmethod
    def matches(cls, shapes):
        k, s, *last = shapes.get("oft_blocks", (0, 0))
        return (
            last == [s]
            and shapes.keys() <= {"oft_blocks", "rescale"}
            and math.prod(shapes.get("rescale", (k, s))) == k * s
        )

    @classmethod
    def made_of(cls, parts, alpha, peft):
        k, s, _ = parts["oft_blocks"].shape
        return cls(parts["oft_blocks"], parts.get("rescale"), (alpha or 0.0) * k * s)

    @property
    def shape(self):
        return (self.blocks.shape[0] * self.blocks.shape[1],)

    def fits(self, shape):
        return len(shape) > 1 and shape[0] == self.shape[0]

    def of(self, weight):
        blocks, base = read(self.blocks, weight.device), weight.float()
        q = blocks - blocks.mT
        if self.constraint > 0:
            q = q * (self.constraint / (q.norm() + 1e-8)).clamp(max=1)
        one = torch.eye(q.shape[1], device=q.device)
        rotated = torch.linalg.solve(one - q, one + q).mT @ base.reshape(*q.shape[:2], -1)
        if self.rescale is not None:
            rotated = rotated * read(self.rescale, weight.device).view(*q.shape[:2], 1)
        return rotated.view(weight.shape) - base

    def saved(self, leaf, strength):
        if strength != 1:
            raise ValueError("an OFT cannot be scaled in its file")
        tensors = [("oft_blocks", self.blocks.read()), ("alpha", torch.tensor(self.constraint / self.shape[0]))]
        return tensors + ([] if self.rescale is None else [("rescale", self.rescale.read())])


@dataclass(frozen=True)
class InputRotation(Change):
    """PEFT's OFT: the weight's columns are cut into groups of s, and each group is multiplied from the right by R^T,
    where R (s,s) is a rotation that is made from a skew-symmetric matrix q. vectors (k, s(s-1)/2): the upper triangles
    of the k matrices q.

    terms: the number of terms of the Neumann series with which PEFT approximates R = (1 + q)(1 - q)^-1. If `terms` is
    None, R is the inverse of this matrix, (1 - q)(1 + q)^-1, without approximation. limit: the largest norm that
    each q may have (COFT), or None. shared: whether all groups use the same R (k = 1).
    """

    vectors: Entry
    terms: int | None
    limit: float | None
    shared: bool
    form = "OFT"

    @classmethod
    def matches(cls, shapes):
        shape = shapes.get("oft_R", ())
        return len(shape) == 2 and len(shapes) == 1 and cls._side(shape) ** 2 - cls._side(shape) == 2 * shape[1] > 0

    @classmethod
    def made_of(cls, parts, alpha, peft):
        terms = peft.get("num_cayley_neumann_terms", 5) if peft.get("use_cayley_neumann") else None
        limit = peft["eps"] / math.sqrt(parts["oft_R"].shape[0]) if peft.get("coft") else None
        return cls(parts["oft_R"], terms, limit, bool(peft.get("block_share")))

    @staticmethod
    def _side(shape):
        return round((1 + math.sqrt(1 + 8 * shape[1])) / 2)

    @property
    def shape(self):
        return (self.vectors.shape[0] * self._side(self.vectors.shape),)

    def fits(self, shape):
        k, width = self.vectors.shape[0], self.shape[0]
        return len(shape) == 2 and (k == 1 and shape[1] % width == 0 if self.shared else shape[1] == width)

    def of(self, weight):
        vectors, base, s = read(self.vectors, weight.device), weight.float(), self._side(self.vectors.shape)
        q = torch.zeros(len(vectors), s, s, device=weight.device)
        rows, columns = torch.triu_indices(s, s, 1)
        q[:, rows, columns] = vectors
        q = q - q.mT
        if self.limit is not None:
            q = q * (self.limit / q.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).clamp(max=1)
        rotated = torch.einsum(
            "okc,krc->okr", base.unflatten(1, (-1, s)), self._rotations(q).expand(base.shape[1] // s, s, s)
        )
        return rotated.flatten(1) - base

    def _rotations(self, q):
        one = torch.eye(q.shape[1], device=q.device)
        if self.terms is None:
            return torch.linalg.solve(one + q, one - q)
        rotation, power = one + 2 * q * (self.terms > 1), q
        if self.terms > 2:
            for _ in range(2, max(3, self.terms - 1)):
                power = power @ q
                rotation = rotation + 2 * power
            rotation = rotation + power @ q
        return rotation


@dataclass(frozen=True)
class Dora(Change):
    """DoRA: the change `inner` is added to the weight, and then the rows or columns of the sum are rescaled to have the
    given `norms`. axis: 0 for one norm per row (output), 1 for one norm per column (input).
    """

    inner: Change
    norms: Entry
    axis: int
    form = "DoRA"

    @property
    def shape(self):
        return self.inner.shape

    def fits(self, shape):
        return self.inner.fits(shape) and shape[self.axis] == self.norms.numel

    def of(self, weight):
        base = weight.float()
        merged = base + self.inner.of(weight)
        others = [d for d in range(merged.dim()) if d != self.axis]
        now = torch.linalg.vector_norm(merged, dim=others, keepdim=True) + torch.finfo(torch.float32).eps
        return merged.mul_(read(self.norms, weight.device).view(now.shape) / now).sub_(base)

    def saved(self, leaf, strength):
        if strength != 1:
            raise ValueError("a DoRA cannot be scaled in its file")
        norms = self.norms.read()
        return [*self.inner.saved(leaf, 1), ("dora_scale", norms.view(-1, 1) if self.axis == 0 else norms.view(1, -1))]


@dataclass(frozen=True)
class Dense(Change):
    """A change that the file stores in full, as one tensor that is added to the parameter."""

    entry: Entry
    form = "difference"

    @classmethod
    def matches(cls, shapes):
        return shapes.keys() == {"diff"}

    @classmethod
    def made_of(cls, parts, alpha, peft):
        return cls(parts["diff"])

    @property
    def shape(self):
        return self.entry.shape

    def of(self, weight):
        return read(self.entry, weight.device).view(weight.shape)

    def saved(self, leaf, strength):
        return [({"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[leaf], scaled(self.entry, strength))]

    def norm(self):
        return read(self.entry).double().norm().item()


@dataclass(frozen=True)
class Rows(Change):
    """A change of some rows of an embedding table. `values` (n,D) are added to the rows with indices `ids` (n), or
    replace these rows if `replaces` is true.
    """

    values: Entry
    ids: Entry
    replaces: bool = False
    form = "rows"

    @classmethod
    def matches(cls, shapes):
        a, ids = shapes.get("A", ()), shapes.get("ids", ())
        return shapes.keys() == {"A", "ids"} and len(a) == 2 and ids == a[:1]

    @classmethod
    def made_of(cls, parts, alpha, peft):
        return cls(parts["A"], parts["ids"])

    def read(self, device="cpu"):
        """Return (ids (n) int64, values (n,D) fp32), both on `device`."""
        return self.ids.read().to(device, torch.int64), read(self.values, device)

    @property
    def shape(self):
        return self.values.shape

    def fits(self, shape):
        return len(shape) == 2 and shape[1] == self.shape[1] and int(self.read()[0].max()) < shape[0]

    def of(self, weight):
        ids, values = self.read(weight.device)
        change = torch.zeros_like(weight, dtype=torch.float32)
        change[ids] = values - weight[ids].float() if self.replaces else values
        return change

    def add_to(self, parameter, strength=1.0):
        ids, values = self.read(parameter.device)
        now = parameter[ids].float()
        if self.replaces:
            values = values if strength == 1 else now + strength * (values - now)
        else:
            values = now + strength * values
        parameter[ids] = values.to(parameter.dtype)


@dataclass(frozen=True)
class Value(Change):
    """A parameter's value in another checkpoint. The change is that value minus the current one."""

    entry: Entry
    form = "value"

    @property
    def shape(self):
        return self.entry.shape

    def fits(self, shape):
        return tuple(shape) == tuple(self.shape)

    def of(self, weight):
        return read(self.entry, weight.device) - weight.float()

    def add_to(self, parameter, strength=1.0):
        step = max(1, SLICE // (4 * math.prod(self.shape[1:])))
        for begin in range(0, len(parameter), step):
            part = parameter[begin : begin + step]
            there, here = read(self.entry.part(begin, begin + len(part)), part.device), part.float()
            part.copy_(there if strength == 1 else here + strength * (there - here))


SLICE = 64 << 20  # size of the slices that Value changes one by one, in bytes of fp32 values
OTHER_FORMS = (Kron, Hadamard, GLora, Rotation, InputRotation, Dense, Rows)  # all forms except lora.LowRank
