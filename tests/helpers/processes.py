"""Two processes under `accelerate launch`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml


ROOT = Path(__file__).parents[2]
COMMON = dict(
    compute_environment="LOCAL_MACHINE",
    distributed_type="MULTI_GPU",  # with use_cpu: two gloo processes; MULTI_CPU would silently start one
    use_cpu=True,
    mixed_precision="no",
    num_machines=1,
    num_processes=2,
    machine_rank=0,
    rdzv_backend="static",
    same_network=True,
    main_training_function="main",
    debug=False,
)
FSDP = dict(
    fsdp_version=2,
    fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP",
    fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer",
    fsdp_state_dict_type="FULL_STATE_DICT",
    fsdp_reshard_after_forward=True,
    fsdp_cpu_ram_efficient_loading=False,
)
CONFIGS = {"ddp": COMMON, "fsdp2": COMMON | dict(distributed_type="FSDP", fsdp_config=FSDP)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(config: dict, folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Run a command under `accelerate launch` with a config file, on a free port, one thread per process."""
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(config | dict(main_process_port=free_port())))
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *command],
        check=False,
        cwd=ROOT,
        env=os.environ | dict(OMP_NUM_THREADS="1", CI="1", HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=400,
    )
