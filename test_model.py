"""Talk to the tuned model, the base, or the merged model.

    python test_model.py                         the adapter of the configured run
    python test_model.py merged/tamsin --prompt "Who are you?"

/help lists what can be typed in chat. Ctrl-C stops a reply, end of input (Ctrl-D, Ctrl-Z) leaves.
"""

import argparse
from pathlib import Path

from persona.console import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help="folder of a run, an adapter or a merged model, or a base model's name"
    )
    parser.add_argument("--config", type=Path, help="settings (default: the run's own, else config/default.json)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting")
    parser.add_argument("--base", action="store_true", help="talk to the base model alone")
    parser.add_argument("--prompt", metavar="TEXT", help="answer once and leave")
    parser.add_argument("--system", metavar="TEXT|@FILE", help="another system prompt than the trained one")
    parser.add_argument("--load-in-4bit", action="store_true", help="hold a merged model in 4 bits, to fit a small GPU")
    args = parser.parse_args()

    from persona.model.adapters import locate, run_settings

    config = run_settings(args.model, args.config, args.set)
    base, adapter = locate(config, args.model, args.base)  # before transformers is imported: it switches the hub off

    from persona.model.loading import enough_memory
    from persona.speak.chat import answer_once, chat
    from persona.speak.speaker import load_speaker

    merged = adapter is None and not args.base
    in_4bit = args.load_in_4bit if merged else config.quantization.load_in_4bit
    with enough_memory("Lower data.max_length, or take a smaller model; --load-in-4bit holds a merged one in 4 bits."):
        speaker = load_speaker(config, base, adapter, in_4bit)
        if args.prompt is not None:
            answer_once(speaker, args.system, args.prompt)
        else:
            chat(speaker, args.system)


if __name__ == "__main__":
    run_script(main)
