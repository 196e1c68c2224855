"""What the command `codegen --json` printed, read again."""

from typing import Any

from gpu_embed.bench.codegen.compile import Compiled
from gpu_embed.bench.codegen.instructions import Instruction, MachineCode


def compiled_from_json(fields: dict[str, Any]) -> Compiled:
    """The inverse of Compiled.to_json."""
    machine = MachineCode(**fields["machine"])
    machine = machine._replace(instructions=[Instruction(*each) for each in machine.instructions])
    instructions = [Instruction(*each) for each in fields["instructions"]]
    return Compiled(**{**fields, "instructions": instructions, "machine": machine})
