"""Print the commands of README.md: its ```bash blocks, in order.

CI runs what this prints, so the README is the one place where the commands are written.
A block that CI must not run gets another language: ```console.
"""

import re
from pathlib import Path

readme = Path(__file__).parent.parent / "README.md"
blocks = re.findall(r"^```bash\n(.*?)^```$", readme.read_text(), flags=re.MULTILINE | re.DOTALL)
if not blocks:
    raise SystemExit(f"{readme} has no ```bash block, so there is nothing to run")
print("\n".join(blocks))
