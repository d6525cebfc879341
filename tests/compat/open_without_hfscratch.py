"""Runs where hfscratch cannot be imported: opens folders by their own code, and prints first outputs as JSON.

python open_without_hfscratch.py FOLDER, in which asked.json has `open`, `{folder: Auto class}`, and `tokens`.
"""

import json
import sys
from pathlib import Path


class Refuse:
    """The first that is asked where a module is."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hfscratch":
            raise ModuleNotFoundError(f"{name} is refused in this test")


sys.meta_path.insert(0, Refuse())

import torch  # noqa: E402
import transformers  # noqa: E402
from load_with_4_57 import first_output  # noqa: E402

folder = Path(sys.argv[1])
asked = json.loads((folder / "asked.json").read_text())
found = {"transformers": transformers.__version__, "outputs": {}}
for name, auto_class in asked["open"].items():
    options = {"trust_remote_code": True, "output_loading_info": True}
    model, information = getattr(transformers, auto_class).from_pretrained(folder / name, **options)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not any(information.values()), information
    with torch.no_grad():
        found["outputs"][name] = first_output(model.eval()(torch.tensor(asked["tokens"]))).tolist()
sys.stdout.write(json.dumps(found))
