"""How long a visitor of the app waits for the first answer: `python -m examples.space_latency`, on the embedded models."""

import statistics
import time

from gradio_client import Client

from agl_trl.space import build_app, launch_options
from agl_trl.space.side_by_side import EXAMPLES


def main(rounds: int = 5) -> None:
    start = time.perf_counter()
    app = build_app()
    url = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **launch_options())[1]
    print(f"app ready after   {time.perf_counter() - start:.2f} s (after its imports)")
    client = Client(url, verbose=False)
    waits: dict[str, list[float]] = {"first words": [], "first answer": [], "all three answers": []}
    for _, prompt in EXAMPLES * rounds:
        start, found = time.perf_counter(), dict[str, float]()
        for panes in client.submit(prompt, api_name="/answers"):
            told = time.perf_counter() - start
            for name, reached in zip(waits, (panes[0]["answer"], panes[0]["done"], panes[-1]["done"]), strict=True):
                if reached:
                    found.setdefault(name, told)
        for name, told in found.items():
            waits[name].append(told)
    for name, values in waits.items():
        print(
            f"{name:<18}first visitor {values[0]:.2f} s, median {statistics.median(values):.2f} s, slowest {max(values):.2f} s"
        )
    app.close()


if __name__ == "__main__":
    main()
