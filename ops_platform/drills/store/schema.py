"""The tables of drills in the platform's PostgreSQL, and the advisory locks under which they are changed."""

from __future__ import annotations

from typing import LiteralString

SPACE = 0x6F707364  # "opsd": advisory locks of drills
ADMISSION = 2  # 1 is of `ledger.Tables`

SCHEMA: LiteralString = """
create schema if not exists ops_drills;

create table if not exists ops_drills.drills (
  id text primary key,
  plan text not null,
  runbook text not null,
  body jsonb not null,
  body_sha256 text not null,
  subject text not null,
  domain text not null,
  environment text not null,
  scenario text not null,
  mode text not null check (mode in ('drill', 'real')),
  parameters jsonb not null,
  objectives jsonb not null,
  operator text not null,
  trigger text not null,
  approved_by text,
  digest text not null,
  state text not null,
  started_at timestamptz not null,
  updated_at timestamptz not null,
  version bigint not null default 1,
  ending text,
  reason text not null default '',
  abort jsonb,
  ended_at timestamptz,
  verdict text,
  card jsonb,
  check ((state = 'ended') = (ended_at is not null))
);
create unique index if not exists drills_one_a_target on ops_drills.drills (subject) where state <> 'ended';
create unique index if not exists drills_one_a_domain on ops_drills.drills (domain) where state <> 'ended';
create index if not exists drills_started on ops_drills.drills (started_at);

create table if not exists ops_drills.steps (
  drill text not null references ops_drills.drills,
  step text not null,
  state text not null,
  attempts int not null default 0,
  started_at timestamptz,
  ended_at timestamptz,
  said text not null default '',
  facts jsonb not null default '{}',
  checks jsonb not null default '[]',
  measured jsonb not null default '[]',
  primary key (drill, step)
);

create table if not exists ops_drills.resources (
  id bigint generated always as identity primary key,
  drill text not null references ops_drills.drills,
  step text not null,
  kind text not null,
  name text not null,
  host text not null,
  detail jsonb not null,
  keep boolean not null,
  made_at timestamptz not null,
  gone_at timestamptz,
  leftover text,
  unique (drill, kind, name)
);
create index if not exists resources_there on ops_drills.resources (drill) where gone_at is null;

create table if not exists ops_drills.samples (
  id bigint generated always as identity primary key,
  drill text not null references ops_drills.drills,
  probe text not null,
  at timestamptz not null,
  ok boolean not null,
  ms real not null,
  n bigint,
  error text
);
create index if not exists samples_of on ops_drills.samples (drill, probe, at);

create table if not exists ops_drills.answers (
  drill text not null references ops_drills.drills,
  step text not null,
  who text not null,
  at timestamptz not null,
  text text not null,
  evidence jsonb not null,
  primary key (drill, step)
);

create table if not exists ops_drills.approvals (
  id bigint generated always as identity primary key,
  digest text not null,
  who text not null,
  at timestamptz not null,
  expires_at timestamptz not null
);
create index if not exists approvals_digest on ops_drills.approvals (digest, id);

create table if not exists ops_drills.findings (
  id text primary key,
  key text not null,
  drill text not null references ops_drills.drills,
  plan text not null,
  subject text not null,
  runbook text not null,
  title text not null,
  detail text not null,
  owner text not null,
  due timestamptz not null,
  state text not null,
  opened_at timestamptz not null,
  seen int not null default 1,
  last_drill text not null,
  note text not null default '',
  closed_at timestamptz,
  closed_by text
);
create unique index if not exists findings_one_open on ops_drills.findings (key) where state = 'open';
"""
