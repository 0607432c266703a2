"""The programs of README.md: prints the nth block of a language below a heading.

    readme.py HEADING LANGUAGE [N]
"""

import re
import sys
from pathlib import Path

heading, language = sys.argv[1:3]
number = int(sys.argv[3]) if len(sys.argv) > 3 else 0
text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
part = text.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]
print(re.findall(rf"^```{language}\n(.*?)^```", part, re.M | re.S)[number], end="")
