"""What commands that draw images from text share: flags that say which captions, who reads them, and what decodes latents."""

from __future__ import annotations

import argparse
import sys

from sim_jax import distributed, load
from sim_jax.data import captions, encoders
from sim_jax.data.captions import Captions
from sim_jax.load import Loaded
from sim_jax.sharding import Layout

_WORDS = ("prompt", "prompts", "captions")


def add(parser: argparse.ArgumentParser) -> None:
    """--prompt, --prompts, --captions, --encoder, --autoencoder."""
    parser.add_argument("--prompt", action="append", help="networks that take text: what to draw; again for more")
    parser.add_argument("--prompts", help="... a text file, a prompt a line")
    parser.add_argument("--captions", help="... or captions embedded before: a directory of sim_jax.data.embed_prompts, or builtin:NAME")
    parser.add_argument("--encoder", help="what reads the prompts: a directory with a T5 and its tokenizer, or builtin:NAME (default: the built-in "
                                          "one that it was trained with)")
    parser.add_argument("--autoencoder", help="networks of latents: a directory of sim_jax.convert --kind=vae, which decodes them")


def check(args: argparse.Namespace) -> None:
    """What can be seen without the network. Raises: ValueError for flags that exclude each other."""
    if args.captions and (args.prompt or args.prompts or args.encoder):
        raise ValueError("--captions: allowed without --prompt, --prompts and --encoder")
    if args.encoder and not (args.prompt or args.prompts):
        raise ValueError(f"--encoder: got {args.encoder!r}, allowed with --prompt or --prompts")


def find(args: argparse.Namespace, loaded: Loaded) -> Captions | None:
    """The captions to draw, as the network takes them; None where it takes no text.

    Raises: ValueError for none where it does, some where it does not, an encoder that is missing, or captions of another width or length.
    """
    network, given = loaded.network, [name for name in _WORDS if getattr(args, name)]
    if not network.text_dim:
        if given:
            raise ValueError(f"--{given[0]}: got {getattr(args, given[0])!r}, allowed: nothing, this network takes no text")
        return None
    if not given:
        raise ValueError("--prompt: got nothing, allowed: --prompt, --prompts or --captions, as this network takes text")
    fit = dict(width=network.text_dim, tokens=network.text_tokens or None, key=f"--{'captions' if args.captions else 'encoder'}")
    if args.captions:
        return captions.fitted(captions.open_captions(args.captions, key="--captions"), **fit)
    prompts = [*(args.prompt or ()), *(captions.read_prompts(args.prompts) if args.prompts else ())]
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("--prompt: got an empty one, allowed: words")
    encoder = _encoder(args, loaded)
    warning = captions.cut(encoder, prompts)[1]
    if warning and distributed.is_first():
        print(warning, file=sys.stderr)
    try:
        made = captions.encoded(encoder, prompts)
    except ValueError as error:
        raise ValueError(f"--prompt: {error}") from None
    return captions.fitted(made, **fit)


def _encoder(args: argparse.Namespace, loaded: Loaded) -> encoders.Encoder:
    trained = loaded.text_encoder or ""
    path = args.encoder or (trained if captions.is_builtin(trained) else None)
    if path is None:
        known = f" (it was trained with {trained})" if trained else ""
        raise ValueError(f"--encoder: got nothing, allowed: a directory with a T5 and its tokenizer, or builtin:NAME{known}")
    return encoders.open_encoder(path, max_tokens=None if captions.is_builtin(path) else loaded.network.text_tokens or None, key="--encoder")


def decoder(args: argparse.Namespace, loaded: Loaded, layout: Layout) -> load.Decoder | None:
    """What decodes the network's images; None where they are pixels.

    Raises: ValueError for latents without an autoencoder, or one of other latents.
    """
    spec = loaded.network.spec
    if args.autoencoder is not None:
        return load.Decoder(args.autoencoder, spec, layout=layout, key="--autoencoder")
    if spec["img_channels"] not in (1, 3):
        raise ValueError("--autoencoder: got nothing, allowed: a directory of sim_jax.convert --kind=vae, as this network's images are latents of "
                         f"{spec['img_channels']} channels")
    return None
