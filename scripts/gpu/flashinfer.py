"""FlashInfer as one small file that an offline GPU machine can use: wheels of pinned versions from
PyPI, without the sources of kernels that peers.py does not call.

    python3 flashinfer.py FILE.tar.xz

The file is unpacked into a folder of Python's path. The machine needs PyTorch and a CUDA toolkit
besides: FlashInfer compiles what is called, unless FLASHINFER_KERNELS names a folder in which a run
there has left what it compiled (`cached_ops/NAME/NAME.so`). PEER_PYTHON is its version of Python
(3.12).
"""

import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

# apache-tvm-ffi loads the compiled kernels; torch-c-dlpack-ext spares it compiling something itself.
WHEELS = ("flashinfer-python==0.7.2.post1", "apache-tvm-ffi==0.1.15.post2",
          "torch-c-dlpack-ext==0.1.5")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]


def wanted(name):
    """Whether a file of a wheel is of use: all Python, and of `flashinfer/data` what attention over
    pages (CUDA cores, fa2, fa3, XQA) includes."""
    parts = name.split("/")
    if parts[:2] != ["flashinfer", "data"]:
        return True
    if parts[2] == "csrc":
        return parts[3] == "xqa" or (len(parts) == 4 and "cake_" not in name)
    if parts[2] == "cutlass":
        return parts[3] == "include" or parts[3:6] == ["tools", "util", "include"]
    return parts[2] in ("include", "cccl", "spdlog")


def compiled():
    """Kernels of an earlier run: where FlashInfer looks before it compiles, and their bytes."""
    folder = os.environ.get("FLASHINFER_KERNELS")
    if folder:
        for path in sorted(pathlib.Path(folder).glob("**/cached_ops/*/*.so")):
            if path.stem == path.parent.name:
                yield f"flashinfer/data/aot/{path.stem}/{path.name}", path.read_bytes()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o755 if name.endswith(".so") else 0o644
    tar.addfile(info, io.BytesIO(data))


def main():
    to = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--disable-pip-version-check", "--only-binary=:all:", "--dest", folder,
                   "--python-version", os.environ.get("PEER_PYTHON", "3.12"), "--implementation", "cp"]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        subprocess.run(command + list(WHEELS), check=True)
        # A low preset: it is a few megabytes more, and minutes less.
        with tarfile.open(to, "w:xz", preset=1) as tar:
            for wheel in sorted(pathlib.Path(folder).glob("*.whl")):
                with zipfile.ZipFile(wheel) as files:
                    for name in filter(wanted, files.namelist()):
                        add(tar, name, files.read(name))
            for name, data in compiled():
                add(tar, name, data)
    print(f"{to}: {to.stat().st_size >> 20} MiB")


if __name__ == "__main__":
    main()
