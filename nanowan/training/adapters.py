"""The LoRA that is trained: the files that it starts from (--init_lora), and how far it moves the weights."""

import torch

from lora import adapter, change_norm
from nanowan.errors import BadInput
from nanowan.formats.dit import new_dit
from nanowan.formats.lora import changes_to_start_from, choose_experts, parse_lora_spec


def initial_loras(specs, pipe, schedule, new_adapter):
    """Return {expert: file} for `specs`, the values of --init_lora. If the run trains two experts, a value or its file
    must say which expert it is for. schedule: as returned by flags.expert_schedule. new_adapter: the pipeline.Adapter
    to train. Raises BadInput, before anything is computed, for a file from which this adapter cannot start.
    """
    files = {}
    for spec in specs:
        lora = parse_lora_spec(spec, "--init_lora")
        if lora.weight != 1:
            raise BadInput(f"--init_lora {spec}: a weight means nothing here; give FILE, FILE:high, :low or :both")
        for expert in choose_experts(lora, tuple(schedule), "--init_lora")[0]:
            if expert in files:
                raise BadInput(f"--init_lora {spec}: {files[expert]} is for the same expert; give one file for each")
            files[expert] = lora.file
    for expert, file in files.items():
        with torch.device("meta"):
            dit = new_dit(pipe.config(expert))
            new_adapter.inject(dit, None)
        changes_to_start_from(adapter(dit), file, expert)
    return files


@torch.no_grad()
def relative_change(pairs, scale, norms):
    """Return ||dW|| / ||W||, where W is all adapted weights, taken as one matrix, and dW is their change. pairs:
    {module name: (A, B)} with dW = scale * B A. norms: {module name: norm of the module's weight}, as returned by
    lora.weight_norms.
    """
    moved = sum(change_norm(a, b, scale) ** 2 for a, b in pairs.values())
    return (moved / sum(norms[name] ** 2 for name in pairs)).sqrt().item()
