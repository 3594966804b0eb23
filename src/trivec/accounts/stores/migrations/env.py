"""What Alembic runs: every step in the one transaction that its caller has begun."""

from alembic import context

from trivec.accounts.stores.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
context.run_migrations()
