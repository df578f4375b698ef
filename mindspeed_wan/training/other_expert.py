"""The expert that is not trained, for a moment in the trained one's place: its weights visit the same parameters.

The model keeps its layout and the device needs no second model: this rank's shards of the trained weights wait on the
host, the other expert's are read from disk into their storage, and afterwards the trained ones are copied back, bit for
bit. Adapters are switched off meanwhile (their B factors are zero).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from mindspeed_wan.checkpoint.sources import Found, check_expert, check_names_and_shapes, find, open_weights
from mindspeed_wan.checkpoint.weights import checked, load_model_weights
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.lora.apply import is_factor, split_views
from mindspeed_wan.lora.layers import LORA_B
from mindspeed_wan.models.quantization import weight_views
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan.parallel.agreement import first_decides
from mindspeed_wan.parallel.dtensor import local
from mindspeed_wan.parallel.groups import ParallelGroups
from mindspeed_wan.training.restore import check_card

OTHER = {"high": "low", "low": "high"}


def check_other(config: RunConfig, path: str | Path, wan: WanConfig) -> Found:
    """Return the weights at ``path`` if they can stand in for the expert that is not trained. Rank 0.

    Raises:
        CheckpointError: no weights, those of the trained expert, or of another model, task or boundary.
    """
    assert config.diffusion.expert is not None
    found = checked(find(path))
    check_expert(found, OTHER[config.diffusion.expert])
    check_card(found, config, wan, resuming=False)
    with open_weights(found, wan) as files:
        check_names_and_shapes(files, {p.mm: p.shape for p in parameter_table(wan)}, wan)
    return found


class OtherExpert:
    """The weights at ``path``, ready to visit ``model``. Collective to create: they are checked, not read.

    Args:
        config: of the run that trains one expert.
        path: weights of the other one in any known format; a save folder is looked at anew each time.
        model: the trained expert.
        groups: its layout.

    Raises:
        CheckpointError: no weights, of the same expert, or of another model, task or boundary.
    """

    def __init__(self, config: RunConfig, path: str | Path, model: WanDiT, groups: ParallelGroups) -> None:
        assert config.diffusion.expert is not None
        self.name = OTHER[config.diffusion.expert]
        self._path, self._model, self._groups = Path(path), model, groups
        first_decides(lambda: check_other(config, path, model.config))

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """Put the other expert's weights into the model for the length of the block. Collective.

        Raises:
            CheckpointError: they can no longer be read; the trained weights are back in place then, too.
        """
        reshard(self._model)
        kept = {name: local(p.detach()).to("cpu", copy=True) for name, p in self._model.named_parameters()}
        try:
            base, _ = split_views(weight_views(self._model, self._groups))
            load_model_weights(self._path, base, self._model.config, expert=self.name)
            _switch_off(self._model)
            yield
        finally:
            reshard(self._model)
            with torch.no_grad():
                for name, parameter in self._model.named_parameters():
                    local(parameter.detach()).copy_(kept[name])


def reshard(model: torch.nn.Module) -> None:
    """Free FSDP2's gathered copies, which would not see new values in the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def _switch_off(model: WanDiT) -> None:
    for name, parameter in model.named_parameters():
        if is_factor(name) and f".{LORA_B}." in name:
            local(parameter.detach()).zero_()
