"""Cells on two Ray nodes of this machine, one of which is killed once both are at work.

Run as: python two_ray_nodes.py CELLS OUTCOMES, two JSON files; the second is written.
"""

import json
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from loralloc.experiments.cell import Cell
from loralloc.experiments.executors.cluster import run
from loralloc.experiments.executors.executor import Resources
from loralloc.experiments.executors.worker import as_data
from loralloc.experiments.work import RESULT

STORE_BYTES = 80 * 2**20
"""Ray asks for no less."""

LONGEST_WAIT_S = 120


def main(given, answer):
    cells = [Cell.from_data(data) for data in json.loads(Path(given).read_text())]
    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    seen = {}

    def lose_one():
        end = time.monotonic() + LONGEST_WAIT_S
        while sum(cell.folder.is_dir() for cell in cells) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        # Two begun and none finished, with one processor a node: both nodes are at work.
        seen["finished"] = sum((cell.folder / RESULT).is_file() for cell in cells)
        cluster.remove_node(second, allow_graceful=False)
        seen["lost"] = not second.any_processes_alive()

    killer = threading.Thread(target=lose_one)
    killer.start()
    outcomes = list(run(cells, Resources(cpus_per_cell=1, retries=3)))
    killer.join()
    found = [{"seed": outcome.cell.seed, **as_data(outcome)} for outcome in outcomes]
    Path(answer).write_text(json.dumps({**seen, "outcomes": found}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
