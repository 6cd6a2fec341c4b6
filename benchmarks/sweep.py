"""Many runs side by side: every (setting, seed) is one celora run in a single-threaded process of its own.

A run that is done is not repeated, one that was cut off is resumed: start the same command again.
"""

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Tree = dict[str, Any]
Summary = dict[str, Any]
UNBORN = {".lock", "experiment.toml", "experiment.toml.tmp", "session.json.tmp"}
"""What is in a run folder before it can be resumed."""


def merged(*trees: Tree) -> Tree:
    """Settings, section by section; later ones win."""
    out: Tree = {}
    for tree in trees:
        for section, values in tree.items():
            out[section] = {**out.get(section, {}), **values} if isinstance(values, dict) else values
    return out


def one(tree: Tree, base: str, folder: str) -> Summary:
    """A run to its end, from wherever its folder stands.

    Raises:
        RuntimeError: if the folder holds a run with other settings.
    """
    import warnings

    import torch

    from celora import experiment
    from celora.experiment.config import dump, resolve

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path, resolved = Path(folder), resolve(tree, Path(base))
    if (config := path / "config.toml").exists() and config.read_text() != dump(resolved):
        raise RuntimeError(f"{path} was made with other settings, or by another version: delete it, or choose --out")
    if not (path / "summary.json").exists():
        going = (path / "session.json").exists()
        if path.exists() and not going and {file.name for file in path.iterdir()} <= UNBORN:
            shutil.rmtree(path)  # killed before there was anything to resume
        for _ in experiment.resume(path) if going else experiment.run(resolved, path, twin=False):
            pass
    summary: Summary = json.loads((path / "summary.json").read_text())
    return summary


def sweep(
    runs: Iterable[tuple[str, Tree]], base: Path, out: Path, workers: int, failed: dict[str, str] | None = None
) -> dict[str, Summary]:
    """Name -> summary, for runs named by their folder below `out`.

    Args:
        failed: given, a run that fails is noted here, and the others go on.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    named = dict(runs)
    fresh = {name for name in named if not (out / name / "summary.json").exists()}
    done: dict[str, Summary] = {}
    began, ended = time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(one, tree, str(base), str(out / name)): name for name, tree in named.items()}
        for count, future in enumerate(as_completed(waiting), 1):
            name = waiting[future]
            try:
                done[name] = future.result()
            except Exception as error:
                if failed is None:
                    raise
                failed[name] = told = f"{type(error).__name__}: {error}"
            else:
                best = done[name]["moments"][done[name]["moment"]]["validation"]
                told = f"validation {best:.3f}  {done[name]['seconds']:.0f} s"
            ended += name in fresh
            minutes = (time.monotonic() - began) / max(1, ended) * (len(fresh) - ended) / 60
            left = f"  about {minutes:.0f} min left" if name in fresh else ""
            print(f"[{count}/{len(named)}] {name}  {told}{left}", file=sys.stderr, flush=True)
    return {name: done[name] for name in named if name in done}
