"""Checks what `make demo` left behind: the page is whole, the network has learned."""

import json
import re
from pathlib import Path

out = Path("runs/demo")
page = (out / "index.html").read_text(encoding="utf-8")
assert "<svg" in page or "data:image/" in page, "index.html has no picture"
outside = re.findall(r"""(?:src|href)=["']?(?:https?:)?//[^"'> ]*""", page)
assert not outside, f"index.html needs the network: {outside}"

epochs = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
best = max(epoch["test_accuracy"] for epoch in epochs)
last = epochs[-1]["test_accuracy"]
print(f"test accuracy after {len(epochs)} epochs: {last:.4f} (best {best:.4f})")
assert last >= 0.975, "below 97.5 %"
assert last <= 1, "test_accuracy is a fraction"
