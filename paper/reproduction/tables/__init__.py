"""The tables, from the data sets and the stored results."""

from paper.reproduction.tables.ablations import table4
from paper.reproduction.tables.cost import table3
from paper.reproduction.tables.data import table1
from paper.reproduction.tables.quality import table2, table5, table6
from paper.reproduction.tables.questions import findings, table7

TABLES = {1: table1, 2: table2, 3: table3, 4: table4, 5: table5, 6: table6, 7: table7}

__all__ = ["TABLES", "findings", "table1", "table2", "table3", "table4", "table5", "table6", "table7"]
