-- ARGV: 'k' if a key is written, 'p' if one is put, else ''; number of checks; the checks; the writes.
-- Checks: 'a' key · 'u' key modified · 's' ticket token. Writes: 'p' key value lease · 'd' key · 'l' ticket.
-- Answers 1 and the revision if applied, 0 and the revision and the culprit's place if not, -1 and the lease
-- if a lease has ended.

-- Everything that there is to know, in one call: the records, in the order in which they are used below.
local wanted = { 'rev' }
local at = 3
while ARGV[at] do
  local kind, field = ARGV[at], ARGV[at + 1]
  wanted[#wanted + 1] = ((kind == 's' or kind == 'l') and 'T:' or 'K:') .. field
  if kind == 'l' then wanted[#wanted + 1] = 'W:' .. field end
  if kind == 'p' or kind == 'd' then
    wanted[#wanted + 1] = 'D:' .. string.match(field, '^[^\n]*')
    if kind == 'p' then
      wanted[#wanted + 1] = 'L:' .. ARGV[at + 3]
      at = at + 4
    else
      at = at + 2
    end
  else
    at = at + ((kind == 'u' or kind == 's') and 3 or 2)
  end
end
local found = call('HMGET', H, unpack(wanted))
local last = found[1]
if not last then last = bump() - 1 end

local function main()
  local first, slot = 3, 2
  for check = 1, tonumber(ARGV[2]) do
    local kind, record, holds = ARGV[first], found[slot], nil
    if kind == 'a' then
      holds = not record
      first = first + 2
    else
      if kind == 'u' then record = record and string.sub(record, 18, 33) end
      holds = record == ARGV[first + 2]
      first = first + 3
    end
    if not holds then return { 0, revision or tonumber(last), check - 1 } end
    slot = slot + 1
  end
  if ARGV[1] == 'p' then
    local at, slot = first, slot
    while ARGV[at] do
      if ARGV[at] == 'p' then
        local lease = ARGV[at + 3]
        if lease ~= '' and not found[slot + 2] then return { -1, lease } end
        at, slot = at + 4, slot + 3
      else
        at, slot = at + 2, slot + 2
      end
    end
    -- A full server refuses the first write if it adds data, and the transaction with it.
    bump(last)
    store()
  end
  local at = first
  while ARGV[at] do
    local kind, field, record = ARGV[at], ARGV[at + 1], found[slot]
    if kind == 'p' then
      local value, lease = ARGV[at + 2], ARGV[at + 3]
      local stamp = string.format('%016.0f', revision)
      local meta = (record and string.sub(record, 1, 16) or stamp) .. ' ' .. stamp .. ' ' .. lease
      call('HSET', H, 'K:' .. field, meta, 'V:' .. field, value)
      if not record then call('ZADD', Z, 0, 'i:' .. field) end
      local left = record and string.sub(record, 35) or ''
      if left ~= lease then
        if left ~= '' then call('ZREM', Z, 'a:' .. left .. '\nk' .. field) end
        if lease ~= '' then call('ZADD', Z, 0, 'a:' .. lease .. '\nk' .. field) end
      end
      changed(field, found[slot + 1], meta, value)
      at, slot = at + 4, slot + 3
    elseif kind == 'd' then
      if record then
        bump(last)
        drop_key(field, record, found[slot + 1])
      end
      at, slot = at + 2, slot + 2
    else
      if record then
        bump(last)
        drop_ticket(field, record, found[slot + 1])
      end
      at, slot = at + 2, slot + 2
    end
  end
  return { 1, revision or tonumber(last) }
end

local reply = main()
if revision then store() else call('HDEL', H, '') end
if tell then tell() end
return reply
