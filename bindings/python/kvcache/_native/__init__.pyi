"""What maturin makes from the header: the declarations, and the library that they are of."""

from typing import Any

ffi: Any
lib: Any
