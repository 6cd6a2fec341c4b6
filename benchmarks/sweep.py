"""Many runs side by side: every (setting, seed) is one celora run in a single-threaded process of its own.

A run that is done is not repeated, one that was cut off is resumed: start the same command again.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Tree = dict[str, Any]
Summary = dict[str, Any]


def merged(*trees: Tree) -> Tree:
    """Settings, section by section; later ones win."""
    out: Tree = {}
    for tree in trees:
        for section, values in tree.items():
            out[section] = {**out.get(section, {}), **values} if isinstance(values, dict) else values
    return out


def one(tree: Tree, base: str, folder: str) -> Summary:
    """A run to its end, from wherever its folder stands."""
    import warnings

    import torch

    from celora import experiment
    from celora.experiment.config import resolve

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = Path(folder)
    if not (path / "summary.json").exists():
        going = (path / "session.json").exists()
        resolved = resolve(tree, Path(base))
        for _ in experiment.resume(path) if going else experiment.run(resolved, path, twin=False):
            pass
    summary: Summary = json.loads((path / "summary.json").read_text())
    return summary


def sweep(runs: Iterable[tuple[str, Tree]], base: Path, out: Path, workers: int) -> dict[str, Summary]:
    """Name -> summary, for runs named by their folder below `out`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    named = dict(runs)
    done: dict[str, Summary] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(one, tree, str(base), str(out / name)): name for name, tree in named.items()}
        for future in as_completed(waiting):
            name = waiting[future]
            done[name] = future.result()
            best = max(m["validation"] for m in done[name]["moments"].values())
            print(
                f"[{len(done)}/{len(named)}] {name}  validation {best:.3f}  {done[name]['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return {name: done[name] for name in named}
