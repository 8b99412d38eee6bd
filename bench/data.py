"""How fast the stream is: loading, a slow network, resuming at the end of three million samples, indexing. `make bench`.

`PYTHONPATH=. python bench/data.py [rounds]`, some five minutes for three. Each part runs alone as well.
"""

import os
import sys

sys.path.sort(key=os.path.dirname(os.path.abspath(__file__)).__eq__)  # this folder last: `data` would be this file

from bench import data_index, data_order, data_stream


def main(rounds: int) -> None:
    for part in (data_stream, data_order, data_index):
        part.main(rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
