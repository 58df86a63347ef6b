"""What steps share that change groups of layers in full precision."""

from abc import abstractmethod
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import nn

from ptq_llm.groups import Finder, Group
from ptq_llm.rescale import TOLERANCE, check
from ptq_llm.simulation import Simulation
from ptqcore import Block, Calibration, Dataflow, Step, StepOptions, check_globs, say


class GroupOptions(StepOptions):
    """skip: globs of layers whose groups are left alone."""

    skip: tuple[str, ...] = ()


class GroupStep(Step):
    """Finds the groups of every block and checks each.

    A group that does not keep the function under random factors is left alone, which is said once for
    all blocks alike.
    """

    Options: ClassVar[type[StepOptions]] = GroupOptions
    options: GroupOptions
    stage = "transform"

    @abstractmethod
    def choose(self, candidates: list[Group]) -> list[Group]:
        """The groups that the step is to change; a layer is a consumer in one of them."""

    def shifts(self, group: Group, block: Block) -> bool:
        """Whether the step may move offsets of a group, too."""
        return False

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        self.finder = Finder(model, flow)
        self._refused: set[str] = set()
        check_globs(f"steps.{self.name}.skip", self.options.skip, model)

    def groups(self, block: Block, calibration: Calibration) -> list[Group]:
        """The groups of a block that are to be changed, not yet checked, in the order in which they run."""
        return self._chosen(self.finder.candidates(block, calibration.io))

    def groups_of_model(self) -> list[Group]:
        """The groups of all blocks, as far as the dataflow map alone shows them."""
        groups = self._chosen(self.finder.from_map(Block(self.finder.model, "")))
        skipped = self.context.reason_to_skip
        return [group for group in groups if any(skipped(path) is None for path in group.consumers)]

    def keeps_function(self, group: Group, block: Block, calibration: Calibration) -> bool:
        """Whether random factors (and offsets) leave the block's output as it is; says if not."""
        error = check(block, calibration.io, group, self.shifts(group, block))
        if error <= TOLERANCE:
            return True
        name = group.within(block.path)
        if name not in self._refused:
            self._refused.add(name)
            say(
                f"{self.name}: {name} of {block.path} (and blocks alike) is left alone: rescaling it "
                f"changes the block's output by {error:.2g}"
            )
        return False

    def change_in_turn(
        self, block: Block, calibration: Calibration, find: Callable[[Group], Callable[[], None] | None]
    ) -> None:
        """Change the groups of a block in the order in which they run, everything before each of them
        rounded as the recipe says.

        Args:
            block: the block, in full precision.
            calibration: its calibration.
            find: searches the change of a group, and returns what makes it; None to leave the group alone.
        """
        groups = self.groups(block, calibration)
        with Simulation(block, calibration, self.context) as simulation:
            for group in groups:
                with simulation.paused():
                    if not self.keeps_function(group, block, calibration):
                        continue
                simulation.add(self.finder.map.before(group.consumers, block))
                calibration.refresh(group.consumers)
                change = find(group)
                if change is not None:
                    with simulation.paused():
                        change()
                calibration.changed()
        calibration.changed()

    def _chosen(self, candidates: list[Group]) -> list[Group]:
        def skipped(group: Group) -> bool:
            return any(fnmatchcase(path, glob) for path in group.layers for glob in self.options.skip)

        chosen = self.choose([group for group in candidates if not skipped(group)])
        return sorted(chosen, key=lambda group: self.finder.map.order[group.consumers[0]])
