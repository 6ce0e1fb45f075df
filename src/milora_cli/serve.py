"""`milora serve`: an OpenAI-compatible server for many tenants on one backbone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import typer

from milora_cli import options
from milora_cli.output import quiet_libraries
from milora_core.errors import MiLoraError, importing


def command(
    backbone: Annotated[str, typer.Option("--backbone", metavar="NAME", help="'tiny', a folder or a hub id.")],
    adapters: Annotated[
        Path | None,
        typer.Option(
            "--adapters",
            metavar="DIR",
            help="Folder of adapters. Those directly in it are loaded; others may be loaded later, from below it only.",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 selects a free port.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", metavar="FILE", help="Tenants and their hashed API keys, in YAML; else MILORA_KEYS."),
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            "--admin-key-file",
            metavar="FILE",
            help="SHA-256 of the key that may load and unload adapters; else MILORA_ADMIN_KEY_SHA256.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option("--served-model-name", metavar="NAME", help="The backbone's name for requests; by default NAME."),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", min=1, help="Maximum number of texts generated at the same time.")
    ] = 32,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Maximum number of waiting requests; more get 429.")
    ] = 1024,
    queue_seconds: Annotated[
        float,
        typer.Option(
            "--queue-seconds",
            min=0.1,
            callback=options.not_nan,
            help="A request that waits longer is refused with 503; inf: no limit.",
        ),
    ] = 60.0,
    kv_cache_mib: Annotated[int, typer.Option("--kv-cache-mib", min=1, help="Memory for keys and values.")] = 1024,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option("--max-num-batched-tokens", min=1, help="Tokens per step; longer prompts are split in chunks."),
    ] = 512,
    max_loras: Annotated[int, typer.Option("--max-loras", min=1, help="Maximum number of adapters in memory.")] = 32,
    max_lora_rank: Annotated[int, typer.Option("--max-lora-rank", min=1, help="Largest rank of an adapter.")] = 256,
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Reuse keys and values of common prompts.")
    ] = True,
    drain_seconds: Annotated[
        float,
        typer.Option(
            "--drain-seconds",
            min=0,
            callback=options.finite,
            help="Time for running requests to finish after SIGTERM.",
        ),
    ] = 30.0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="torch's threads on a CPU.")] = None,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a backbone and many adapters over HTTP, as OpenAI's API does.

    Logs are JSON lines on standard error, without prompts and texts. SIGTERM lets running requests end.
    """
    if log_level not in ("debug", "info", "warning", "error"):
        raise MiLoraError(f"--log-level takes debug, info, warning or error; found {log_level!r}.")
    if adapters is not None and not adapters.is_dir():
        raise MiLoraError(f"--adapters {adapters}: there is no such folder.")
    with importing("serve", "milora serve"):
        from milora.serving import logs, process
    logs.configure(log_level)
    tenants = process.read_tenants(keys, admin_key_file)
    with process.Address(host, port).bind() as listening:
        if tenants.is_open and host not in ("127.0.0.1", "::1", "localhost"):
            logs.log("open_to_all", level=30, host=host, fix="give --keys FILE, so that requests need an API key")
        import torch

        from milora.backbone.loading import load_backbone
        from milora.backbone.positions import positions_of
        from milora.serving.admission import Admission, AdmissionLimits, adapters_below
        from milora.serving.engine import Engine, EngineSettings
        from milora.serving.prompts import Prompts
        from milora.serving.service import Service, ServiceSettings, admitted

        quiet_libraries()
        if threads is not None:
            torch.set_num_threads(threads)
        model, tokenizer = load_backbone(backbone, dtype=dtype, device=device)
        admission = Admission(model, adapters, AdmissionLimits(rank=max_lora_rank))
        # The engine's thread decodes with its own: tokenizers are not safe to share between threads.
        prompts = Prompts(model, copy.deepcopy(tokenizer))
        name = served_model_name or backbone
        found = {} if adapters is None else adapters_below(adapters)
        engine = Engine(
            model,
            tokenizer,
            admitted(found, name, admission, prompts),
            EngineSettings(
                most_texts=max_num_seqs,
                step_tokens=max_num_batched_tokens,
                cache_bytes=kv_cache_mib * 2**20,
                prefix_cache=prefix_caching,
                most_waiting=max_waiting,
                adapters_in_memory=max_loras,
            ),
        )
        settings = ServiceSettings(name, positions=positions_of(model), queue_seconds=queue_seconds)
        service = Service(engine, prompts, tenants, admission, settings)
        process.run(service, listening, drain_seconds)
