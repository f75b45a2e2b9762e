-- A believable shop, so that a restored database has something to be checked for.
create extension if not exists citext;
create extension if not exists pg_trgm;
create schema shop;

create table shop.customers (
    id bigint generated always as identity primary key,
    email citext not null unique,
    full_name text not null,
    address jsonb not null,
    created_at timestamptz not null default now()
);
create index customers_name_lower on shop.customers (lower(full_name));
create index customers_city on shop.customers using gin ((address -> 'tags'));

create table shop.products (
    id int generated always as identity primary key,
    sku text not null unique,
    title text not null,
    price numeric(12, 2) not null check (price >= 0),
    attributes jsonb not null default '{}'
);
create index products_title_trgm on shop.products using gin (title gin_trgm_ops);

create table shop.orders (
    id bigint generated always as identity,
    customer_id bigint not null references shop.customers (id),
    status text not null default 'new' check (status in ('new', 'paid', 'shipped', 'returned')),
    total numeric(14, 2) not null default 0,
    placed_at timestamptz not null default now(),
    primary key (id, placed_at)
) partition by range (placed_at);

create table shop.order_items (
    order_id bigint not null,
    line int not null,
    product_id int not null references shop.products (id),
    quantity int not null check (quantity > 0),
    price numeric(12, 2) not null,
    primary key (order_id, line)
);

create table shop.payments (
    id uuid primary key default gen_random_uuid(),
    order_id bigint not null,
    amount numeric(14, 2) not null,
    method text not null,
    paid_at timestamptz not null default now(),
    details jsonb not null default '{}'
);
create index payments_order on shop.payments (order_id);

create unlogged table shop.carts (customer_id bigint primary key, content jsonb not null);
create sequence shop.invoice_number start 100000;
create table shop.invoices (
    number bigint primary key default nextval('shop.invoice_number'),
    order_id bigint not null,
    scan oid not null
);
create table shop."Notizen über Kunden" (id int primary key, "Text mit ""Zitat""" text);

create function shop.order_total() returns trigger language plpgsql as $$
begin
    update shop.orders set total = total + new.quantity * new.price where id = new.order_id;
    return new;
end $$;
create trigger order_total after insert on shop.order_items for each row when (pg_trigger_depth() = 0) execute function shop.order_total();

do $$
declare
    month date := date_trunc('month', now() - interval '5 months');
begin
    while month < now() + interval '3 months' loop
        execute format('create table shop.orders_%s partition of shop.orders for values from (%L) to (%L)',
                       to_char(month, 'YYYYMM'), month, month + interval '1 month');
        month := month + interval '1 month';
    end loop;
end $$;
create table shop.orders_rest partition of shop.orders default;

insert into shop.customers (email, full_name, address, created_at)
select 'customer' || n || '@example.com', 'Customer ' || md5(n::text),
       jsonb_build_object('city', 'City ' || n % 97, 'zip', lpad((n % 99999)::text, 5, '0'), 'tags', jsonb_build_array(n % 7, 'web')),
       now() - (n % 150) * interval '1 day'
from generate_series(1, 20000) n;

insert into shop.products (sku, title, price, attributes)
select 'SKU-' || n, 'Product ' || substr(md5(n::text), 1, 12), round((5 + n % 400)::numeric * 1.07, 2), jsonb_build_object('weight', n % 50)
from generate_series(1, 2000) n;

insert into shop.orders (customer_id, status, placed_at)
select 1 + (n * 7919) % 20000, (array['new', 'paid', 'shipped', 'returned'])[1 + n % 4],
       now() - (n % 140) * interval '1 day' - (n % 1439) * interval '1 minute'
from generate_series(1, 60000) n;

alter table shop.order_items disable trigger order_total;
insert into shop.order_items
select o.id, l, 1 + (o.id * 31 + l) % 2000, 1 + (o.id + l) % 3, p.price
from shop.orders o cross join generate_series(1, 2) l join shop.products p on p.id = 1 + (o.id * 31 + l) % 2000;
alter table shop.order_items enable trigger order_total;
update shop.orders o set total = s.total from (select order_id, sum(quantity * price) total from shop.order_items group by 1) s where s.order_id = o.id;

insert into shop.payments (order_id, amount, method, paid_at, details)
select id, total, (array['card', 'transfer', 'invoice'])[1 + id % 3], placed_at + interval '1 hour', jsonb_build_object('ref', md5(id::text))
from shop.orders where status <> 'new';

insert into shop.invoices (order_id, scan)
select id, lo_from_bytea(0, decode(repeat(md5(id::text), 200), 'hex')) from shop.orders order by id limit 50;
insert into shop."Notizen über Kunden" values (1, 'Grüße – “quoted”'), (2, null);
analyze;
