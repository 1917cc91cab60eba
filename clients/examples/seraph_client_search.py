"""Search with seraph_client: texts by their vectors, and the nearest ones put in order by a cross-encoder.

The server needs an embedding model and a cross-encoder:

    seraph serve SOURCE-OF-A-CROSS-ENCODER --embedding-model SOURCE

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/seraph_client_search.py "QUESTION"
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from seraph_client import Client, SeraphClientError

TEXTS = (
    "Rivers carry water from the mountains to the sea.",
    "Bread is baked from flour, water and salt.",
    "A mountain is higher than a hill.",
    "The sea is salty because rivers bring salt to it.",
)
NUM_NEAREST = 3


def main() -> int:
    question = " ".join(sys.argv[1:]) or "Why is the sea salty?"
    base_url = os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000")
    with Client(base_url, api_key=os.environ.get("SERAPH_API_KEY"), timeout=60) as client:
        try:
            asked, *known = client.embed([question, *TEXTS]).vectors
            nearest = sorted(TEXTS, key=lambda text: -_similarity(asked, known[TEXTS.index(text)]))[:NUM_NEAREST]
            for found in client.rerank(question, nearest).results:
                print(f"{found.score:.3f}  {found.document}")
        except SeraphClientError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _similarity(a: Sequence[float], b: Sequence[float]) -> float:
    """Of vectors of length 1, as the server gives them: their cosine."""
    return sum(x * y for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    sys.exit(main())
