"""ptq-toy: a small plugin as somebody else would write it, on the public names of ptqcore alone."""

from ptqcore import Plugin

plugin = Plugin(
    name="toy",
    tasks={"toy-regression": "ptq_toy.task:ToyRegression"},
    steps={"error-feedback-round": "ptq_toy.step:ErrorFeedbackRound"},
    observers={"three-sigma": "ptq_toy.observer:ThreeSigma"},
    recipes="ptq_toy/recipes",
    default_recipe="feedback-w4a8",
    commands="ptq_toy.commands:app",
)
