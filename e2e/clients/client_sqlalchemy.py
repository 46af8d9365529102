"""SQLAlchemy: the ORM's unit of work over psycopg 3, and the core over asyncpg."""

import asyncio
import os

from sqlalchemy import ForeignKey, String, create_engine, func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from hook import check, switch


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "sa_customer"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(80), unique=True)
    orders: Mapped[list["Order"]] = relationship(back_populates="customer")


class Order(Base):
    __tablename__ = "sa_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(ForeignKey("sa_customer.id"))
    amount: Mapped[int]
    customer: Mapped[Customer] = relationship(back_populates="orders")


def url(driver):
    host, port = os.environ["PGHOST"], os.environ["PGPORT"]
    user, password = os.environ["PGUSER"], os.environ.get("PGPASSWORD", "")
    database = os.environ["PGDATABASE"]
    return f"postgresql+{driver}://{user}:{password}@{host}:{port}/{database}"


def unit_of_work(engine):
    with Session(engine) as session:
        ada = Customer(name="ada", orders=[Order(amount=n) for n in range(10)])
        session.add(ada)
        session.flush()
        try:
            with session.begin_nested():
                session.add(Customer(name="ada"))
                session.flush()
        except IntegrityError:
            pass
        seen = {"ada": ada.id, **{n: order.id for n, order in enumerate(ada.orders)}}
        switch()
        grace = Customer(name="grace", orders=[Order(amount=100), Order(amount=200)])
        session.add(grace)
        session.flush()
        seen |= {"grace": grace.id, **{order.amount: order.id for order in grace.orders}}
        for order in session.scalars(select(Order).where(Order.customer_id == ada.id)):
            order.amount += 1
        session.commit()
    return seen


def check_ids(session, seen):
    """Every id that the program saw is the id of that row."""
    found = {name: key for name, key in session.execute(select(Customer.name, Customer.id))}
    for amount, key in session.execute(select(Order.amount, Order.id)):
        # What the program has done to the amounts since it saw the ids.
        found[amount // 2 if amount >= 100 else amount - 1] = key
    check("ids", found, seen)


async def core():
    engine = create_async_engine(url("asyncpg"))
    async with engine.begin() as conn:
        await conn.execute(text("update sa_order set amount = amount * 2 where amount >= 100"))
        await asyncio.to_thread(switch)
        total = await conn.scalar(text("select sum(amount) from sa_order where amount >= 100"))
        check("sum inside the transaction", total, 600)
    await engine.dispose()


def main():
    engine = create_engine(url("psycopg"))
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    seen = unit_of_work(engine)
    asyncio.run(core())
    with Session(engine) as session:
        query = select(Customer.name, func.count(), func.sum(Order.amount))
        rows = session.execute(query.join(Order).group_by(Customer.name).order_by(Customer.name))
        check("orders", [tuple(r) for r in rows], [("ada", 10, 55), ("grace", 2, 600)])
        check_ids(session, seen)
    Base.metadata.drop_all(engine)
    engine.dispose()


main()
