"""Training: adapters of video diffusion transformers, LoRA length extension, export.

Read these five files first, in this order; each is a page or two:

    run.py                       one run, from a validated config to a finished folder
    assemble.py                  its parts: loader, trainer, module, callbacks
    step/module.py               one step: noise, velocity, loss
    attention/step.py            which attention each layer runs in a step
    models/base.py               what a model family has to provide

Beside them lie flow.py, which noise level a clip is trained at and whether its attention is dense there; shards.py,
which clips a run trains on, is validated on and measured on; preflight.py, what is refused before anything is loaded.
The folders, in the order in which a run passes them:

    config/        what a person may write: the typed schema, how it is composed, how it is checked
    attention/     which attention a run and each of its steps has, and over how many GPUs
    models/        one adapter a family (models/families/), loading weights, temporal positions
    parallel/      strategies of Lightning, ZeRO's parts, messages among ranks, processes
    lora/          the LoRA's layers, its files in every format, names and scales of other tools
    memory/        what a layer keeps for its backward, where it lies, compiling, float8, weights that stream
    step/          one training step: what its clips are trained with, its objective, the module, the optimizer
    planning/      memory, time, and what layers keep where it is left to the plan, before a GPU is touched
    storage/       the run's folder and its lock, checkpoints, resuming
    loggers/       metrics.csv, TensorBoard, Weights & Biases, the record of the environment
    measures/      how good a model is: losses of clips, intervals, the Euler sampler, measures of generated clips
    export/        the LoRA as files of other tools, merged models, verification
    sample/        generating clips with diffusers' pipelines
    report/        losses on held-out clips at a run's end; the run as one page, its charts and pictures
    decay/         how attention falls off with distance in each head, and what a mask would keep of it
    callbacks/     what happens around a step: metrics, checkpoints, validation, stops, the watchdog
    evaluate/      a tuned model against controls: losses, generated clips, what is wrong with them
    bench/         a step, measured and taken apart
    sweep/         `python -m train -m`: many runs, one for each combination of values
    study/         masks compared on equal terms, on a base of this project made longer

`README.md` beside this file is the manual.
"""

__version__ = "0.1.0"
