"""Keep a function for later, with the values that its variables have now."""

from __future__ import annotations

from types import CellType, FunctionType

from lightning_plasticity.interventions.units.groups import Forward


def bind_closure(forward: Forward) -> Forward:
    """Copy a function with the present values of its variables: a loop rebinds them before it is called."""
    if not isinstance(forward, FunctionType):
        return forward
    cells = tuple(_copy_cell(cell) for cell in forward.__closure__ or ())
    bound = FunctionType(forward.__code__, {**forward.__globals__}, forward.__name__, forward.__defaults__, cells)
    bound.__kwdefaults__ = forward.__kwdefaults__
    return bound


def _copy_cell(cell: CellType) -> CellType:
    try:
        return CellType(cell.cell_contents)
    except ValueError:
        # The variable is not assigned yet.
        return cell
