"""What the command line takes from Hydra's private modules still does what it is taken for."""

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext

from runs import ROOT
from sturdy.cli.hydra_internals import is_quoted, make_flag_parser, make_launcher_context


def test_the_parser_knows_hydras_flags_and_no_abbreviations():
    parser = make_flag_parser()
    args, unknown = parser.parse_known_intermixed_args(["a=1", "-m", "--cfg", "job", "b=2"])
    assert (args.overrides, args.multirun, args.cfg, unknown) == (["a=1", "b=2"], True, "job", [])
    for flag in ("help", "hydra_help", "info", "shell_completion", "config_path", "config_name"):
        assert not getattr(args, flag)
    _, unknown = parser.parse_known_intermixed_args(["--experiment", "cars"])
    assert unknown[:1] == ["--experiment"]


def test_a_launcher_is_set_up_with_the_loader():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        context = make_launcher_context(loader)
    assert isinstance(context, HydraContext)
    assert context.config_loader is loader
    context.callbacks.on_multirun_start  # noqa: B018  a launcher calls these


def test_quotes_are_seen():
    parser = OverridesParser.create()
    assert is_quoted(parser.parse_override("a='2024'"))
    assert not is_quoted(parser.parse_override("a=2024"))
    assert not is_quoted(parser.parse_override("a=text"))
