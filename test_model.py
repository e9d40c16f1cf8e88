"""Talk to the tuned model, the base, or the merged model.

    python test_model.py                         the adapter of the run in config/default.json
    python test_model.py merged/tamsin --prompt "Who are you?"

/help lists the commands of the chat. Ctrl-C stops a reply, Ctrl-D (Windows: Ctrl-Z and Enter) leaves.
"""

import argparse
from pathlib import Path

from persona.console import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL",
                        help="folder of a run, an adapter or a merged model, or a base model's name "
                        "(default: training.output_dir of the settings)")  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="FILE",
                        help="JSON file of settings (default: the run's own, else config/default.json)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                        help="change one setting, e.g. generation.temperature=0; may be repeated")  # fmt: skip
    parser.add_argument("--base", action="store_true", help="talk to the base model without its adapter")
    parser.add_argument("--prompt", metavar="TEXT", help="print the reply to TEXT, without a chat")
    parser.add_argument("--system", metavar="TEXT|@FILE",
                        help="system prompt instead of the trained one: TEXT, or the text in FILE")  # fmt: skip
    parser.add_argument("--load-in-4bit", action="store_true", help="hold a merged model in 4 bits, to fit a small GPU")
    args = parser.parse_args()

    from persona.model.adapters import locate, run_settings

    config = run_settings(args.model, args.config, args.set)
    folders = locate(config, args.model, args.base)  # before transformers is imported: it switches the hub off

    from persona.speak.chat import talk

    talk(config, folders, None if args.base else args.load_in_4bit, args.system, args.prompt)


if __name__ == "__main__":
    run_script(main)
