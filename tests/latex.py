"""A LaTeX table as its reader has it: compiled where there is LaTeX, and its structure everywhere."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs}
\usepackage{adjustbox}
\begin{document}
%s
\end{document}
"""


def _compile(text: str) -> None:
    """Fails where LaTeX does, and where something is wider than the text or higher than the page."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "page.tex").write_text(_DOCUMENT % text, encoding="utf-8")
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0 and "Overfull" not in done.stdout and "too large" not in done.stdout, done.stdout


def rows_of(text: str) -> list[list[str]]:
    """The cells of each row of each tabular.

    Fails where it does not compile, environments do not nest, braces do not match, a row has another number of cells than
    the preamble has columns, or a character that means something to LaTeX stands unescaped.
    """
    if shutil.which("pdflatex"):
        _compile(text)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    opened, columns, rows = [], 0, []
    for line in filter(None, text.splitlines()):
        for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", line):
            if kind == "begin":
                opened.append(name)
            else:
                assert opened.pop() == name
        bare = re.sub(r"\\[\\{}_%&#$]", "", line)
        assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0, line
        if preamble := re.match(r"\\begin\{tabular\}\{([lr]+)\}$", line):
            columns = len(preamble[1])
        if line.endswith(r" \\"):
            assert opened[-3:] == ["table", "adjustbox", "tabular"]
            cells = re.split(r"(?<!\\)&", line.removesuffix(r" \\"))
            assert sum(int(wide) for wide in re.findall(r"\\multicolumn\{(\d+)\}", line)) + sum(
                r"\multicolumn" not in cell for cell in cells
            ) == columns, line  # fmt: skip
            assert not re.search(r"[_#%~^<>|–±]", bare), line
            rows.append([cell.strip() for cell in cells])
        elif not re.match(r"\\(label|begin|end|cmidrule)", line):
            assert not re.search(r"[_#%&~^<>|–±]", bare), line
    assert not opened
    return rows
