"""What a compressed model is worth: size, work, memory and time, by the survey's definitions."""

from rarefy.measure.distribution import histograms
from rarefy.measure.latency import Latency, latency
from rarefy.measure.memory import peak_memory
from rarefy.measure.rates import compression_rate, index_space_saving, speed_up_rate
from rarefy.measure.size import layer_parameters, nonzero, parameters
from rarefy.measure.stage import measure
from rarefy.measure.work import flops, flops_by_module

__all__ = [
    "Latency", "compression_rate", "flops", "flops_by_module", "histograms", "index_space_saving", "latency",
    "layer_parameters", "measure", "nonzero", "parameters", "peak_memory", "speed_up_rate",
]  # fmt: skip
