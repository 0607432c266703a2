#!/usr/bin/env python3
"""What a C header promises, held against an older one.

    scripts/abi.py stubs HEADER OUT.c         every function of the header, with a body
    scripts/abi.py offsets HEADER OUT.c       a program that prints where each struct field lies
    scripts/abi.py cffi HEADER                parses the header as Python's cffi does, by cdef
"""

import re
import sys

FUNCTION = re.compile(r"^((?:[\w]+ )+\*?kvc_\w+\([^;{}]*\));$", re.M)
STRUCT = re.compile(r"^typedef struct \{$(.*?)^\} (kvc_\w+);$", re.M | re.S)


def stubs(text):
    code = FUNCTION.sub(r"\1 { __builtin_trap(); }", text)
    assert code.count("__builtin_trap") > 50, "functions were not found"
    return code


def offsets(text):
    lines = ["#include <stdio.h>", "#include \"kvcache.h\"", "int main(void) {"]
    for body, name in STRUCT.findall(text):
        fields = re.findall(r"(\w+)(?:\[\w+\])?;", re.sub(r"//.*", "", body))
        assert fields, name
        for field in fields:
            at = f"offsetof({name}, {field})"
            size = f"sizeof((({name} *)0)->{field})"
            lines.append(f'    printf("{name}.{field} %zu %zu\\n", {at}, {size});')
    assert len(lines) > 100, "structs were not found"
    return "\n".join([*lines, "    return 0;", "}", ""])


def parsed(text):
    import cffi
    ffi = cffi.FFI()
    # cdef has no preprocessor: numbers stay, the rest of the directives goes.
    lines, outside = [], True
    for line in text.splitlines():
        if line.startswith("#ifdef __cplusplus"):
            outside = False
        elif line.startswith("#endif"):
            outside = True
        elif outside and (not line.startswith("#") or re.match(r"#define KVC_\w+ -?\d+$", line)):
            lines.append(line)
    ffi.cdef("\n".join(lines))
    for _, name in STRUCT.findall(text):
        assert ffi.sizeof(name) > 0
    return f"cffi {cffi.__version__}: {len(FUNCTION.findall(text))} functions, " \
           f"{len(STRUCT.findall(text))} structs"


what, header, *out = sys.argv[1:]
with open(header, encoding="utf-8") as file:
    text = file.read()
if what == "cffi":
    print(parsed(text))
else:
    with open(out[0], "w", encoding="utf-8") as file:
        file.write({"stubs": stubs, "offsets": offsets}[what](text))
