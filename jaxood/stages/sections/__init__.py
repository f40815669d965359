"""Parts of the report that are about one method. `report` calls them, in this order.

A section is a module with

    applies(config)        whether an experiment's report has it; `config` is that of its own arm
    check(config)          raises ConfigError for settings that cannot work
    fits(config, data)     the same, with these data; asked only where it applies
    tell(context)          -> (what it found, as plain values for results.json; its `page.Section`)
    show(found, config)    says what it found in a few lines on the terminal
"""

from jaxood.stages.sections import (
    discrepancy,
    examination,
    near_words,
    pixels,
    pseudo_labels,
    restoration,
)

SECTIONS = {
    'pseudo_labels': pseudo_labels,
    'discrepancy': discrepancy,
    'near_words': near_words,
    'examination': examination,
    'restoration': restoration,
    'pixels': pixels,
}
