"""The structure of a LaTeX table, for machines without LaTeX."""

import re


def rows_of(text: str) -> list[list[str]]:
    """The cells of each row of each tabular.

    Fails where environments do not nest, braces do not match, a row has another number of cells than the preamble has
    columns, or a character that means something to LaTeX stands unescaped.
    """
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
