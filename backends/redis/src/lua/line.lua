-- ARGV: line. Answers the names in order, the first one's token and value.
call('HDEL', H, '')
local prefix = 'o:' .. ARGV[1] .. '\n'
local names = call('ZRANGEBYLEX', Z, '[' .. prefix, '(o:' .. ARGV[1] .. '\v')
if #names == 0 then return {} end
for i, member in ipairs(names) do names[i] = string.sub(member, #prefix + 18) end
local field = ARGV[1] .. '\n' .. names[1]
local front = call('HMGET', H, 'T:' .. field, 'P:' .. field)
return { names, tonumber(front[1]), front[2] or '' }
