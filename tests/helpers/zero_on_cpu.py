"""``python -m train`` with DeepSpeed on a CPU: Lightning's refusal to start there is lifted, all else is as on GPUs."""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import lightning.pytorch.strategies.deepspeed as lightning_deepspeed
import torch
from lightning.pytorch.accelerators import CPUAccelerator

import train.preflight
from train.__main__ import main

torch.set_num_threads(1)
lightning_deepspeed.CUDAAccelerator = CPUAccelerator
lightning_deepspeed._validate_device_index_selection = lambda devices: None
CPUAccelerator.get_parallel_devices = staticmethod(lambda devices: [torch.device("cpu", 0)] * int(devices))
train.preflight.check_parallel = lambda config, elsewhere: None

main(sys.argv[1:])
