"""One answer of each client's language model, before and after: python examples/answers.py runs/demo-llm/fedit

The prompt is that of a client's first test row, which nobody trained on; the reference is what the row itself says.
"""

import sys
from textwrap import indent

import celora


def main(folder: str) -> None:
    """Print them."""
    run = celora.load(folder)
    for client, model in run.items():
        row = run.data.table.inputs[run.data.clients[client].test[0]]
        (before,), (after,) = (model.predict([row["prompt"]], trained=trained) for trained in (False, True))
        print(f"\n{client}: {row['prompt']}")
        for said, answer in (("reference", row["completion"]), ("before", before), ("after", after)):
            print(f"{said:>11}  {indent(answer.strip(), ' ' * 13).strip()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
