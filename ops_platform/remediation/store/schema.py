"""The tables of remediation in the platform's PostgreSQL, and the advisory locks under which they are changed."""

from __future__ import annotations

from typing import LiteralString

SPACE = 0x6F707372  # "opsr": advisory locks of remediation
ADMISSION, OPENING = 2, 3  # 1 is of `ledger.Tables`

SCHEMA: LiteralString = """
create schema if not exists ops_remediation;

create table if not exists ops_remediation.incidents (
  id text primary key,
  rule text not null,
  fingerprint text not null,
  subject text not null,
  playbook text not null,
  state text not null,
  signal jsonb not null,
  opened_at timestamptz not null,
  updated_at timestamptz not null,
  version bigint not null default 1,
  attempts int not null default 0,
  reason text not null default '',
  plan jsonb,
  digest text,
  rulings jsonb not null default '[]',
  outcomes jsonb not null default '[]',
  retry_at timestamptz,
  deadline timestamptz,
  undo_at timestamptz,
  signal_ended_at timestamptz,
  proposed_by text not null default '',
  ending text,
  closed_at timestamptz,
  thread text,
  check ((state = 'closed') = (closed_at is not null) and (state = 'closed') = (ending is not null))
);
do $$ begin  -- tables of before have it added; whoever may not alter them must not need to
  if not exists (select from pg_attribute where attrelid = 'ops_remediation.incidents'::regclass and attname = 'earlier') then
    alter table ops_remediation.incidents add column earlier jsonb not null default '[]';
  end if;
end $$;
create unique index if not exists incidents_one_open on ops_remediation.incidents (rule, fingerprint) where state <> 'closed';
create index if not exists incidents_open on ops_remediation.incidents (state, retry_at) where state <> 'closed';
create index if not exists incidents_of_signal on ops_remediation.incidents (rule, fingerprint, (signal ->> 'starts_at'));
create index if not exists incidents_opened on ops_remediation.incidents (opened_at);
create index if not exists incidents_event on ops_remediation.incidents
  ((signal -> 'labels' ->> 'source'), (signal -> 'labels' ->> 'id')) where signal ->> 'source' = 'kafka';

create table if not exists ops_remediation.approvals (
  id bigint generated always as identity primary key,
  incident text not null references ops_remediation.incidents,
  digest text not null,
  decision text not null check (decision in ('approve', 'refuse')),
  who text not null,
  via text not null,
  at timestamptz not null,
  expires_at timestamptz not null
);
create index if not exists approvals_incident on ops_remediation.approvals (incident, id);

create table if not exists ops_remediation.claims (
  incident text not null references ops_remediation.incidents,
  attempt int not null,
  rule text not null,
  subject text not null,
  domain text not null,
  playbook text not null,
  at timestamptz not null,
  ended_at timestamptz,
  helped boolean,
  primary key (incident, attempt)
);
create index if not exists claims_at on ops_remediation.claims (at);

create table if not exists ops_remediation.pauses (
  id bigint generated always as identity primary key,
  why text not null,
  who text not null,
  at timestamptz not null,
  ended_at timestamptz,
  ended_by text
);
create unique index if not exists pauses_one on ops_remediation.pauses ((true)) where ended_at is null;

-- What rules are replayed over: each time a signal began, changed (silenced, inhibited) or ended.
create table if not exists ops_remediation.signals (
  id bigint generated always as identity primary key,
  at timestamptz not null,
  source text not null,
  fingerprint text not null,
  signal jsonb not null
);
create index if not exists signals_at on ops_remediation.signals (at);
create index if not exists signals_newest on ops_remediation.signals (source, fingerprint, id desc);

-- What people are told: written with the state that it is about, sent when Slack takes it.
create table if not exists ops_remediation.messages (
  id bigint generated always as identity primary key,
  incident text not null references ops_remediation.incidents,
  version bigint not null,
  state text not null,
  reason text not null,
  at timestamptz not null,
  sent_at timestamptz
);
create index if not exists messages_unsent on ops_remediation.messages (id) where sent_at is null;

-- Requests of buttons that were taken: the same one is not taken again.
create table if not exists ops_remediation.requests (
  signature text primary key,
  at timestamptz not null
);

create table if not exists ops_remediation.lag (
  system text not null,
  topic text not null,
  part int not null,
  messages bigint not null,
  at timestamptz not null,
  primary key (system, topic, part)
);

create table if not exists ops_remediation.seen (
  name text primary key,
  at timestamptz not null
);
"""
