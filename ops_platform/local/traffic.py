"""A small live workload on the shop, for demonstrations: orders, items, payments at a steady rate."""

from __future__ import annotations

import random
import time
from pathlib import Path

from ops_platform.local import state_dir
from ops_platform.local.components import admin
from ops_platform.local.stack import Stack

_ORDER = "insert into shop.orders (customer_id) values (%s) returning id"
_ITEM = "insert into shop.order_items select %s, %s, id, %s, price from shop.products where id = %s"
_PAY = "insert into shop.payments (order_id, amount, method) select id, total, 'card' from shop.orders where id = %s"


def run(orders: int, *, per_second: float = 50, directory: Path | None = None) -> int:
    """Place that many orders and return how many were committed."""
    place = Stack.load(directory or state_dir()).place
    chance = random.Random(7)  # noqa: S311 - the same shop each time
    with admin(place, "app-db", "shop") as connection:
        for done in range(orders):
            with connection.transaction():
                order = connection.execute(_ORDER, [chance.randint(1, 20000)]).fetchone()[0]
                for line in range(1, chance.randint(2, 4)):
                    connection.execute(_ITEM, [order, line, chance.randint(1, 3), chance.randint(1, 2000)])
                if done % 3:
                    connection.execute(_PAY, [order])
            time.sleep(1 / per_second)
    return orders
