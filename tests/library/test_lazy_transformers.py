"""Installed next to a run that does not need them, transformers and its like cost no time."""

import subprocess
import sys

import pytest

IMPORTED = """
import sys
print(sorted({"diffusers", "peft", "transformers", "torchmetrics"} & {*sys.modules}))
"""
BERT_SCORE = """
import sys
import exact_resume
from torchmetrics.functional.text import bert
from torchmetrics.text import BERTScore
assert "transformers" not in sys.modules
tokenizer = bert.AutoTokenizer.from_pretrained(sys.argv[1])
metric = BERTScore(sys.argv[1], num_layers=1)
scores = metric(["a cat", "a cat"], ["a cat", "a red bus"])
from transformers import PreTrainedTokenizerBase
print(isinstance(tokenizer, PreTrainedTokenizerBase), *scores["f1"].tolist())
"""


def python(code, *words, path=None):
    """Run ``code`` in a new process, which finds packages in ``path`` first."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}" if path else code
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_run_of_pixels_imports_none_of_them():
    code = "import sturdy.training.session, sturdy.sampling.grid_callback, sturdy.evaluation.report"
    assert python(f"{code}\n{IMPORTED}") == "['torchmetrics']"


def test_control_without_us_torchmetrics_imports_transformers():
    pytest.importorskip("transformers")
    assert "transformers" in python(f"import torchmetrics\n{IMPORTED}")


def test_a_metric_of_text_reaches_the_real_classes(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "red", "bus"]))
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.BertConfig(vocab_size=8, intermediate_size=8, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path)
    is_real, same, other = python(BERT_SCORE, str(tmp_path)).split()
    assert is_real == "True"
    assert float(other) < float(same) == pytest.approx(1, abs=1e-5)


def package(folder, name, code):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def test_what_was_imported_before_stays(tmp_path):
    package(tmp_path, "transformers", "AutoModel = 'real'")
    package(tmp_path, "torchmetrics", "from transformers import AutoModel")
    code = "import {}exact_resume, torchmetrics; print(torchmetrics.AutoModel == 'real')"
    assert python(code.format("transformers, "), path=tmp_path) == "True"
    assert python(code.format(""), path=tmp_path) == "False"


def test_a_torchmetrics_that_wants_more_than_names_gets_the_real_one(tmp_path):
    package(tmp_path, "transformers", "")
    (tmp_path / "transformers" / "utils.py").write_text("answer = 42")
    package(tmp_path, "torchmetrics", "from transformers.utils import answer")
    code = "import exact_resume, torchmetrics; print(torchmetrics.answer)"
    assert python(code, path=tmp_path) == "42"


def test_an_error_of_torchmetrics_itself_is_told(tmp_path):
    package(tmp_path, "transformers", "")
    package(tmp_path, "torchmetrics", "import missing_package")
    code = "import exact_resume\ntry: import torchmetrics\nexcept ImportError as e: print(e.name)"
    code += "\nprint('transformers' in sys.modules)"
    assert python(code, path=tmp_path).split() == ["missing_package", "False"]
