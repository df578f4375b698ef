"""Base of every section, and the words (literal types) they share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

DType = Literal["fp32", "bf16"]
Task = Literal["t2v", "i2v"]
Expert = Literal["high", "low"]
Device = Literal["npu", "cuda", "cpu"]
Attention = Literal["auto", "sdpa", "torch_flash", "torch_efficient", "torch_math", "cudnn", "flash2", "flash3", "sage",
                    "npu"]
ContextParallelAlgo = Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"]
LrDecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
Weighting = Literal["none", "mm", "sigma_sqrt", "cosmap"]
Density = Literal["uniform", "logit_normal"]


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON-ready types (tuples become lists)."""
        return self.model_dump(mode="json")
