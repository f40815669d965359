"""Who lets candidates for outliers pass: judges, or CLIP."""

import jax
import numpy as np

from jaxood import artefacts
from jaxood.data.examples import Examples
from jaxood.stages import learn_tokens, train_judges
from jaxood.stages.common import Context
from jaxood.stages.parts import classifiers, clips
from jaxood.synthesis import filter as leaks
from jaxood.train import checkpoint


def gatekeeper(context: Context):
    """Who lets candidates pass: the judges, CLIP, or None for nobody.

    An object with `facts(facts) -> more of them`, `passes(facts) -> bool[n]`, and `why(fact)`, the
    reason for one that doesn't.
    """
    if train_judges.applies(context.config):
        return Judges(context)
    return Clip(context) if context.config.filter.name == 'clip' else None


class Judges:
    """The ensemble, and the uncertainty that a candidate must exceed."""

    def __init__(self, context: Context):
        folder = context.inputs['train_judges']
        weights = checkpoint.load_weights(folder / 'weights')
        axis_name = context.devices.axis_name
        model = train_judges.build(context.config, context.data.num_classes, axis_name)
        self.members = [
            classifiers.network(context, model, jax.tree.map(lambda x, j=j: x[j], weights))
            for j in range(context.config.filter.count)
        ]
        id_uncertainty = artefacts.load(folder / 'validation.npz')['uncertainty']
        quantile = context.config.filter.quantile
        self.threshold = leaks.threshold(id_uncertainty, quantile=quantile)

    def facts(self, facts):
        examples = Examples(facts['image'])
        logits = [member.outputs(examples)['logits'] for member in self.members]
        return {'uncertainty': np.asarray(leaks.uncertainty(np.stack(logits)))}

    def passes(self, facts):
        return facts['uncertainty'] > self.threshold

    def why(self, fact) -> str:
        return (
            f'judges are {np.exp(-fact["uncertainty"]):.4f} sure of a class; of '
            f'ID images too, only those below {np.exp(-self.threshold):.4f} pass'
        )


class Clip:
    """CLIP, and how much more a candidate must look like its word than like any ID class."""

    def __init__(self, context: Context):
        config = context.config
        self.clip = clips.load(config, context.inputs, context.devices, context.num_rows())
        self.template, self.margin = config.words.template, config.filter.margin
        self.classes = self._prompts(learn_tokens.names(config, context.data))

    def _prompts(self, words):
        return self.clip.ids(self.clip.tokenizer([self.template.format(word) for word in words]))

    def facts(self, facts):
        images = self.clip.looks(Examples(facts['image']))
        words, place = np.unique(facts['word'], return_inverse=True)
        found = leaks.margin(images, self._prompts(words.tolist())[place], self.classes)
        return {'margin': found}

    def passes(self, facts):
        return facts['margin'] > self.margin

    def why(self, fact) -> str:
        return (
            f'CLIP finds it {fact["margin"]:+.4f} more like its word than like an ID class; those '
            f'above {self.margin:+.4f} pass'
        )
