"""The steps of an experiment, in order. `experiment` calls them; they alone read the config.

A stage is a module with

    VERSION            raised when its results change for the same settings
    SEES               the data its result depends on: 'none', 'id', or 'all' with the OOD sets
    ACROSS             one task for all runs, instead of one for each fingerprint
    NEEDS              sections of the config that it cannot do without
    PUBLISHED          files copied from the artefact into the workdir
    applies(config)    whether a run has this stage
    inputs(config)     names of the stages it builds on
    needs_labels(config)
                       whether it learns from the classes of the ID images; a run without such a
                       stage takes images without labels
    settings(config)   what its result depends on, for the fingerprint; no layout, no logging
    check(config)      raises ConfigError for what cannot work, before data are read
    fits(config, data, devices)
                       the same, with these data on these devices, before anything is built
    run(context)       makes the artefact, or goes on with it; returns facts for `done.json`
"""

from jaxood.stages import (
    learn_tokens,
    load_weights,
    pretrain_detector,
    pseudo_label,
    reconstruct_pixels,
    report,
    score,
    synthesise,
    train_detector,
    train_diffusion,
    train_judges,
    train_pipeline,
    train_restorer,
    words,
)

STAGES = {
    'train_pipeline': train_pipeline,
    'pseudo_label': pseudo_label,
    'learn_tokens': learn_tokens,
    'words': words,
    'train_diffusion': train_diffusion,
    'train_judges': train_judges,
    'synthesise': synthesise,
    'pretrain_detector': pretrain_detector,
    'train_detector': train_detector,
    'load_weights': load_weights,
    'train_restorer': train_restorer,
    'score': score,
    'reconstruct_pixels': reconstruct_pixels,
    'report': report,
}
