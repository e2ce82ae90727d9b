"""What train_te.py trains of a text encoder (blocks, or LoRAs in them, and token embeddings), and how it is saved.

The norms of trained token embeddings may grow far beyond those of the embedding table; such embeddings drown the rest
of a prompt (Directional Textual Inversion, arXiv 2512.13672). --keyword_norm limits the norms.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import LoRALinear, adapter, inject, lora_layers
from nanowan.errors import BadInput
from nanowan.parallel import full_tensor, is_sharded, shard

# the linear layers of a UMT5 block; transformers calls them q, k, v, o, wi_0, wi_1 and wo
LORA_TARGETS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
NORM_QUANTILE = 0.99  # --keyword_norm clamp limits norms to this quantile of the table's norms


class RowEmbedding(nn.Module):
    """An embedding table that is frozen except for the rows with indices `ids`. Only these rows get gradients and
    optimizer states. norm: "free", "fixed" (each row keeps the norm that it has when `hold_norms` is first called) or
    "clamp" (norms stay at or below the NORM_QUANTILE quantile of the table's norms). dtype: the dtype of the trained
    rows (default: that of the table).
    """

    def __init__(self, table, ids, norm="free", dtype=None):
        super().__init__()
        device = table.weight.device
        self.table, self.norm, self.ids = table, norm, torch.tensor(sorted(ids), device=device)
        rows = table.weight[self.ids].detach().clone()
        self.rows = nn.Parameter(rows.to(dtype) if dtype else rows)
        self.slot = torch.full((len(table.weight),), -1, device=device)
        self.slot[self.ids] = torch.arange(len(self.ids), device=device)
        self.limits = self.table_stats = None

    def forward(self, ids):
        slot = self.slot[ids]
        # rows[slot] is not used, because several threads would add up its gradient, in no fixed order
        rows = F.embedding(slot.clamp(min=0), self.rows).to(self.table.weight.dtype)
        return torch.where((slot >= 0)[..., None], rows, self.table(ids))

    @torch.no_grad()
    def norms(self):
        """Return the norms (n,) fp32 of the trained rows, divided by the median norm of the table's rows."""
        return full_tensor(self.rows.detach()).float().norm(dim=1) / self._table_norms()[0]

    def _table_norms(self):
        """Return the median and the NORM_QUANTILE quantile of the norms of the table's rows; rows of zeros do not
        count.
        """
        if self.table_stats is None:
            table = full_tensor(self.table.weight.detach())
            norms = torch.cat([part.float().norm(dim=1) for part in table.split(1 << 16)])
            norms = norms[norms > 0].sort().values if norms.any() else norms.new_ones(1)
            self.table_stats = norms[len(norms) // 2], norms[int(NORM_QUANTILE * (len(norms) - 1))]
        return self.table_stats

    @torch.no_grad()
    def hold_norms(self):
        """Scale each trained row back to its fixed norm, or down to the largest norm allowed. Call this after each
        step.
        """
        if self.norm == "free":
            return
        rows = self.rows.to_local() if is_sharded(self.rows) else self.rows  # each rank holds some of the rows
        norms = rows.float().norm(dim=1, keepdim=True).clamp(min=1e-30)
        if self.limits is None and self.norm == "fixed":
            self.limits = norms
            return
        if self.limits is None:
            self.limits = self._table_norms()[1]
        factor = self.limits / norms
        rows.mul_((factor if self.norm == "fixed" else factor.clamp(max=1)).to(rows.dtype))


def unfreeze(encoder, ids, train_blocks=None, rank=None, keyword_norm="free"):
    """Make a frozen encoder partly trainable, in place: the last `train_blocks` blocks (default: all) with the final
    norm or, if `rank` is given, LoRAs of this rank in these blocks; and the token embeddings with indices `ids`. Raises
    BadInput if nothing is left to train, or if `train_blocks` is out of range.
    """
    layers = len(encoder.blocks)
    top = layers if train_blocks is None else train_blocks
    if not 0 <= top <= layers or not top and not ids:
        raise BadInput(f"--train_blocks {train_blocks}: from 0 to {layers}, and with 0 --keywords are needed")
    if rank and top:
        inject(encoder, LORA_TARGETS, rank, rank, blocks=range(layers - top, layers))
    for part in [*encoder.blocks[layers - top :], encoder.norm] if top and not rank else []:
        part.requires_grad_(True)
    if ids:
        dtype = torch.float32 if rank else None
        encoder.token_embedding = RowEmbedding(encoder.token_embedding, ids, keyword_norm, dtype)


def shard_among(encoder, world, dtype, whole):
    """Shard an encoder's parameters over the ranks; the encoder then computes in `dtype`. Trained parameters become
    fp32, which takes little memory: each rank has only a shard of them. If `whole` is true, trained parameters stay
    unsharded, which suits LoRAs and token embeddings, as these are small.
    """
    trained = {p for p in encoder.parameters() if p.requires_grad}
    for p in trained:
        p.data = p.data.float()
    for module in [*encoder.blocks, encoder]:
        shard(module, world, trained if whole else (), dtype)


def trained_parameters(encoder):
    """Return ({name: parameter}, rows): everything that is trained except token embeddings, and the trained token
    embeddings or None.
    """
    trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    return trained, trained.pop("token_embedding.rows", None)


def optimizer_groups(encoder, lr, keyword_lr):
    trained, rows = trained_parameters(encoder)
    groups = [{"params": list(trained.values()), "lr": lr}] if trained else []
    return groups + ([] if rows is None else [{"params": [rows], "lr": keyword_lr}])


@torch.no_grad()
def encoder_tensors(encoder, form, dtype, is_main):
    """Return the tensors of an encoder that a file is to contain, {name: tensor}. form "delta": only the weights that
    training has changed; any other form, such as "full": all weights, under official names. LoRAs are merged in either
    form. Every rank calls this. Only the main rank, which writes the file, gets the tensors; on the other ranks, each
    is None. The tensors are unsharded and on the host, since a GPU may not have room for them during training.
    """
    if hasattr(encoder, "reshard"):  # after a forward pass without a backward pass FSDP leaves the root unsharded
        encoder.reshard()

    def gather(t):
        t = full_tensor(t.detach()).to(dtype)
        return t.cpu() if is_main else None

    trained, rows = trained_parameters(encoder)
    row_ids = None if rows is None else encoder.token_embedding.ids.cpu()
    layers = lora_layers(encoder)
    merged = {f"{name}.weight": gather(merged_weight(m)) for name, m in layers.items()}
    if form == "delta":
        tensors = merged or {k: gather(v) for k, v in trained.items()}
        return tensors | (
            {} if rows is None else {"token_embedding.rows": gather(rows), "token_embedding.ids": row_ids}
        )
    state = {k.replace("token_embedding.table.", "token_embedding."): v for k, v in encoder.state_dict().items()}
    names = [k for k in state if k != "token_embedding.rows" and not any(k.startswith(f"{n}.") for n in layers)]
    tensors = {k: gather(state[k]) for k in names} | merged
    if rows is not None:
        rows = gather(rows)
        if is_main:
            tensors["token_embedding.weight"] = tensors["token_embedding.weight"].index_copy(0, row_ids, rows)
    return tensors


@torch.no_grad()
def relative_changes(encoder, base_rows, entries, dtype, is_main):
    """Return {"blocks": ||dW|| / ||W||, "embeddings": ||dW|| / ||W||}, or {} if not is_main. W is the values before
    training of all matrices of the blocks that are trained, or of all token embeddings that are trained, taken as one
    matrix; dW is its change. A part of which nothing is trained is left out. base_rows: these embeddings (n,D) before
    training. entries: {name: header entry} of the file with the blocks' values before training. Every rank calls this.
    """
    tensors = encoder_tensors(encoder, "delta", dtype, is_main)
    if not is_main:
        return {}
    rows, _ = (tensors.pop(f"token_embedding.{key}", None) for key in ("rows", "ids"))
    sums = {"blocks": [0.0, 0.0]} if any(t.dim() > 1 for t in tensors.values()) else {}
    for name, new in tensors.items():
        if new.dim() > 1:
            old = entries[name].read().float()
            sums["blocks"][0] += (new.float() - old).square().sum().item()
            sums["blocks"][1] += old.square().sum().item()
    if rows is not None:
        old = base_rows.float().cpu()
        sums["embeddings"] = (rows.float() - old).square().sum().item(), old.square().sum().item()
    return {part: math.sqrt(moved / base) if base else math.nan for part, (moved, base) in sums.items()}


def merged_weight(layer: LoRALinear):
    """Return the weight of a LoRALinear with its change added, in fp32."""
    weight = full_tensor(layer.base.weight.detach()).float()
    return weight + layer.scale * (layer.lora_B @ layer.lora_A)


@torch.no_grad()
def encoder_changes(encoder, base_rows):
    """Return the changes of an encoder that write_encoder_lora (nanowan/formats/t5.py) takes: ({module: (A, scale *
    B)}, changes of token embeddings (n,D) or None, ids of these embeddings or None). base_rows: the token embeddings
    (n,D) before training.
    """
    pairs = {
        n: (a.cpu(), m.scale * b.cpu())
        for (n, (a, b)), m in zip(adapter(encoder).items(), lora_layers(encoder).values())
    }
    rows = trained_parameters(encoder)[1]
    if rows is None:
        return pairs, None, None
    return pairs, full_tensor(rows.detach()).float().cpu() - base_rows.float().cpu(), encoder.token_embedding.ids.cpu()
