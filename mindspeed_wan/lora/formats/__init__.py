"""Adapter files: one reader into :class:`LoraFile`, one writer per format, every name checked against the model."""

from mindspeed_wan.lora.formats.file import Adapter, LoraFile
from mindspeed_wan.lora.formats.reader import parse, read_lora, read_tensors
from mindspeed_wan.lora.formats.writer import FORMATS, to_tensors, write_lora

__all__ = ["FORMATS", "Adapter", "LoraFile", "parse", "read_lora", "read_tensors", "to_tensors", "write_lora"]
